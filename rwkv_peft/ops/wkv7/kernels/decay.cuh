// Decays of a WKV-7 chunk, and its inputs scaled by them.
//
// With g_t the sum of log decays of a chunk up to token t and m that of its first half, operands are
// measured from the middle of the chunk: a e^{g_{t-1} - m}, r e^{g_t - m}, b e^{m - g_i},
// k e^{m - g_i}. A decay is above 0.545, so that over 64 tokens no factor leaves e^{+-20}.
#pragma once
#include "warpgroup_mma.cuh"

constexpr float DECAY_SCALE = 0.606530659712633f;  // exp(-1/2)

DEVICE float sigmoid(float x) { return inverse_of(1.0f + power_of_two(-LOG2E * x)); }

// Vectors over channels that the threads of a block share.
struct Shared {
    float totals[WARPS][N];   // product of a warp's decays
    float offsets[WARPS][N];  // e^{g - m} before a warp's tokens
    float middle[N];          // e^m: what the entering state has when measured from the middle
    float end[N];             // e^{G - m}, G the sum over the whole chunk
    u32 documents[4];
};

// Offsets of a warp, which lie apart from it by the warps up to the middle; two channels a lane.
DEVICE void set_offsets(Shared& shared) {
    int warp = warp_index();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int channel = thread_index() % 32 + 32 * i;
        float middle = 1.0f, end = 1.0f, down = 1.0f, up = 1.0f;
#pragma unroll
        for (int other = 0; other < WARPS; other++) {
            float total = shared.totals[other][channel];
            if (other < WARPS / 2) {
                middle *= total;
                down *= other >= warp ? total : 1.0f;
            } else {
                end *= total;
                up *= other < warp ? total : 1.0f;
            }
        }
        shared.offsets[warp][channel] = warp < WARPS / 2 ? inverse_of(down) : up;
        if (warp == 0) shared.middle[channel] = middle, shared.end[channel] = end;
    }
    sync_warp();
}

// e^{g - m} before this thread's two tokens, after the first, after the second. Products, not powers
// of a sum: a sum of logs has the rounding of its largest term in it.
struct Factors {
    float before[8], first[8], second[8];
    DEVICE void invert() {
#pragma unroll
        for (int c = 0; c < 8; c++)
            first[c] = inverse_of(first[c]), second[c] = inverse_of(second[c]);
    }
};

// Calls sync_block in its course.
DEVICE Factors decay_factors(const Tokens& w, const Position& at, Shared& shared) {
    int warp = warp_index(), group = thread_index() % 32 / 8;
    float decay[TOKENS][8], product[8];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        unpack(w.x[i], decay[i]);
        bool is_token = own_token() + i < at.length;
#pragma unroll
        for (int c = 0; c < 8; c++)
            decay[i][c] =
                is_token ? power_of_two(-DECAY_SCALE * LOG2E * sigmoid(decay[i][c])) : 1.0f;
    }
    Factors factor;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        product[c] = decay[0][c] * decay[1][c];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            float earlier = shuffle_up(product[c], 8 * step);
            product[c] *= group >= step ? earlier : 1.0f;
        }
        float earlier = shuffle_up(product[c], 8);
        factor.before[c] = group >= 1 ? earlier : 1.0f;
    }
    if (group == 3) write_eight(shared.totals[warp], product);
    sync_block();
    set_offsets(shared);
    float offset[8];
    read_eight(offset, shared.offsets[warp]);
#pragma unroll
    for (int c = 0; c < 8; c++) {
        factor.before[c] *= offset[c];
        factor.first[c] = factor.before[c] * decay[0][c];
        factor.second[c] = factor.first[c] * decay[1][c];
    }
    return factor;
}

// e^G of the chunk, or 0 where no entering state leaves it
DEVICE void write_decay(float* decay, const Position& at, const Documents& d, const Shared& shared) {
    int c = thread_index();
    if (c < N) decay[at.matrix * N + c] = d.is_carried() ? shared.middle[c] * shared.end[c] : 0.0f;
}

// s = (s + r of tokens that see the entering state) e^m: what y has of the state as it was entering
DEVICE void add_readout(Slab<>& s, Tile r, int row0, const Documents& d, const float* middle) {
    each_pair([&](int j, int i, int row, int column) {
        float x, y;
        get_pair(r, row0 + row, column, x, y);
        bool enters = row0 + row < d.entering;
        s.x[j][2 * i] = (s.x[j][2 * i] + (enters ? x : 0.0f)) * middle[column];
        s.x[j][2 * i + 1] = (s.x[j][2 * i + 1] + (enters ? y : 0.0f)) * middle[column + 1];
    });
}
