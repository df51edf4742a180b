// Decays of a WKV-6 chunk without a factor above one: the chunk is halved down to single tokens.
//
// At level l the chunk falls into pairs of an early and a late half of 2^l tokens. A late token t and
// an early token i of one pair are both measured from the border between them: r_t e^{g_{t-1} - g_b}
// and k_i e^{g_b - g_i}, g the running sum of log decays. Every two tokens are in one pair of halves at
// just one level, that of the highest bit in which their numbers differ.
#pragma once
#include "chunk.cuh"

constexpr int LEVELS = C == 64 ? 6 : 5;
constexpr float MAX_LOGIT = 30.0f;  // exp(-exp(30)) is zero, and what is above would overflow

// Vectors over channels or tokens that the threads of a block share.
struct Shared {
    float totals[WARPS][N];  // product of a warp's decays
    float end[N];            // e^G, G the sum over the whole chunk
    float own[C];            // r_t u k_t
    float own_gradient[C];   // dy_t v_t
    u32 documents[4];
};

DEVICE float rate(float logit) {
    return power_of_two(LOG2E * (logit < MAX_LOGIT ? logit : MAX_LOGIT));
}

// For a thread's tokens: what the chunk's decays before a token leave, and what those after it do.
struct Factors { float before[TOKENS][8], after[TOKENS][8]; };

// A half of tokens and its neighbour become one; `other` is the product of the neighbour's decays.
DEVICE void merge(Factors& f, float (&total)[8], const float (&other)[8], bool is_late) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
        total[c] *= other[c];
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            f.before[i][c] *= is_late ? other[c] : 1.0f;
            f.after[i][c] *= is_late ? 1.0f : other[c];
        }
    }
}

// Chosen number by number: a choice between arrays would put them into local memory.
template <class F> DEVICE void use_level(const Factors& f, int level, bool is_late, F use) {
    float x[TOKENS][8];
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
#pragma unroll
        for (int c = 0; c < 8; c++) x[i][c] = is_late ? f.before[i][c] : f.after[i][c];
    use(level, is_late, x);
}

// Calls use(level, is_late, factors of this thread's tokens) for levels 1 and up; at level 0 there is
// nothing between two tokens. Calls sync_block in its course.
template <class F> DEVICE Factors decay_factors(const Tokens& w, const Position& at, Shared& shared, F use) {
    int warp = warp_index(), group = thread_index() % 32 / 8;
    Factors f;
    float total[8], other[8];
    {
        float decay[TOKENS][8];
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            unpack(w.x[i], decay[i]);
            bool is_token = own_token() + i < at.length;
#pragma unroll
            for (int c = 0; c < 8; c++)
                decay[i][c] = is_token ? power_of_two(-LOG2E * rate(decay[i][c])) : 1.0f;
        }
#pragma unroll
        for (int c = 0; c < 8; c++) {
            f.before[0][c] = 1.0f, f.before[1][c] = decay[0][c];
            f.after[0][c] = decay[1][c], f.after[1][c] = 1.0f;
            total[c] = decay[0][c] * decay[1][c];
        }
    }
#pragma unroll
    for (int level = 1; level < 3; level++) {
        bool is_late = group & level;
        use_level(f, level, is_late, use);
#pragma unroll
        for (int c = 0; c < 8; c++) other[c] = warp_shuffle(total[c], 8 * level);
        merge(f, total, other, is_late);
    }
    if (group == 0) write_eight(shared.totals[warp], total);
    sync_block();
#pragma unroll
    for (int level = 3; level < LEVELS; level++) {
        int size = 1 << (level - 3), first = (warp & ~(size - 1)) ^ size;  // in warps
        bool is_late = warp & size;
        use_level(f, level, is_late, use);
#pragma unroll
        for (int c = 0; c < 8; c++) other[c] = 1.0f;
        for (int i = first; i < first + size; i++) {
            float next[8];
            read_eight(next, shared.totals[i]);
#pragma unroll
            for (int c = 0; c < 8; c++) other[c] *= next[c];
        }
        merge(f, total, other, is_late);
    }
    if (warp == 0 && group == 0) write_eight(shared.end, total);
    return f;
}

// sums[t] = x_t y_t weight, over channels
DEVICE void put_dots(float* sums, const Tokens& x, const Tokens& y, const float (&weight)[8]) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float a[8], b[8], sum = 0.0f;
        unpack(x.x[i], a), unpack(y.x[i], b);
#pragma unroll
        for (int c = 0; c < 8; c++) sum += a[c] * b[c] * weight[c];
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) sum += warp_shuffle(sum, lanes);
        if (own_channel() == 0) sums[own_token() + i] = sum;
    }
}

// The 16-token blocks that a slab meets at a level, as the later or as the earlier one; false: none.
DEVICE bool has_partner(Bounds& b, int level, bool is_later) {
    b.begin = b.slab, b.end = b.slab + 1;
    if (level < 4) return true;
    int size = 1 << (level - 4);
    b.begin = (b.slab & ~(size - 1)) ^ size, b.end = b.begin + size;
    return ((b.slab & size) == 0) == is_later;
}

// One 16x16 block of pair products left right^T of a level, within bounds
DEVICE Fragment level_block(const Rows& left, const Rows& right, int block, int level, const Bounds& b) {
    Slab<2> c;
    set_block(c, left, right, block, b, false);
    Fragment a;
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int differs = (g + i % 2 * 8) ^ (i / 2 * 8 + 2 * q + e);
            if (level < 4 && differs >> level != 1) c.x[i / 2][i % 2 * 2 + e] = 0.0f;
        }
        set_fragment(a, i, c.x[i / 2][i % 2 * 2], c.x[i / 2][i % 2 * 2 + 1]);
    }
    return a;
}
