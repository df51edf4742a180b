// What both forms of WKV-7's backward pass share: how the gradients of a chunk come from the states.
#pragma once
#include "decay.cuh"

struct Inputs { const Io *r, *w, *k, *v, *a, *b; };
struct Outputs { Io *r, *w, *k, *v, *a, *b; };

// The saved inverse of the pair products: this warp's pieces, of those on and below the diagonal. To
// be loaded with the tokens, so that a block waits for memory once.
constexpr int INVERSE_PIECES = (C / 16) * (C / 16) / WARPS;
struct Inverse { Fragment f[INVERSE_PIECES]; };

DEVICE Inverse load_inverse(const Op* inverse, const Position& at) {
    Inverse x;
    int warp = warp_index();
#pragma unroll
    for (int i = 0; i < INVERSE_PIECES; i++) {
        int index = i * WARPS + warp;
        load(x.f[i], piece(inverse + at.matrix * C * C, index / (C / 16), index % (C / 16), C / 16));
    }
    return x;
}

DEVICE void put_inverse(Tile tile, const Inverse& x) {
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < INVERSE_PIECES; i++) {
        int index = i * WARPS + warp, slab = index / (C / 16), k = index % (C / 16);
        if (k > slab) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float value[2];
            get_fragment(x.f[i], j, value[0], value[1]);
            set_pair(tile, slab * 16 + g + j % 2 * 8, k * 16 + j / 2 * 8 + 2 * q, value[0], value[1]);
        }
    }
}

constexpr int WIDE = N + 8;  // of float32 rows, so that eight rows meet all banks

struct GradientMemory {
    enum : u32 {
        TILE = tile_bytes(C), MATRIX = tile_bytes(N),
        A = 0, R = TILE, B = 2 * TILE, K = 3 * TILE, V = 4 * TILE, DY = 5 * TILE, U = 6 * TILE,
        Z = 7 * TILE, INVERSE = 8 * TILE, STATE = 9 * TILE, DSTATE = STATE + MATRIX,
        FACTOR = DSTATE + MATRIX,               // float[C + 1][WIDE]: e^{g_{t-1} - m}
        SHARED = FACTOR + (C + 1) * WIDE * 4,
        LEAVING = SHARED + sizeof(Shared),      // float[WARPS / 4][N]
        BYTES = LEAVING + WARPS / 4 * N * 4,
    };
};
typedef GradientMemory At;

// s *= e^{g_t - m} of its tokens, or its inverse; `factor` at the row of the slab's first token.
template <bool IS_INVERSE> DEVICE void scale_rows(Slab<>& s, const float* factor) {
    const float* here = factor + thread_index() % 32 / 4 * WIDE + thread_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            FloatPair f = *(const FloatPair*)(here + i * 8 * WIDE + j * 8);
            s.x[j][2 * i] *= IS_INVERSE ? inverse_of(f.x) : f.x;
            s.x[j][2 * i + 1] *= IS_INVERSE ? inverse_of(f.y) : f.y;
        }
}

// This warp's pieces of the state that enters a chunk, and of the gradient of the one that leaves it.
static_assert(WARPS % 4 == 0, "a warp has pieces of one column");
constexpr int PIECES = 16 / WARPS;
struct States {
    Fragment state[PIECES];
    FloatPair dstate[PIECES][4];
};

// As tiles, both measured from the chunk's middle.
DEVICE void put_states(const States& s, const Shared& shared) {
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
    int columns[2] = {warp % 4 * 16 + 2 * q, warp % 4 * 16 + 8 + 2 * q};
    FloatPair middle[2], end[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        middle[j] = *(const FloatPair*)(shared.middle + columns[j]);
        end[j] = *(const FloatPair*)(shared.end + columns[j]);
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = (i * WARPS + warp) / 4 * 16 + g + j / 2 * 8, column = columns[j % 2];
            FloatPair m = middle[j % 2], e = end[j % 2], d = s.dstate[i][j];
            float x[2];
            get_fragment(s.state[i], j, x[0], x[1]);
            set_pair(At::STATE, row, column, x[0] * m.x, x[1] * m.y);
            set_pair(At::DSTATE, row, column, d.x * e.x, d.y * e.y);
        }
}

// e^{g_{t-1} - m} of this thread's tokens, as rows
DEVICE void put_factors(const Factors& factor) {
    float* rows = &shared_at<float>(At::FACTOR) + own_token() * WIDE;
    write_eight(rows, factor.before);
    write_eight(rows + WIDE, factor.first);
    if (own_token() == C - TOKENS) write_eight(rows + 2 * WIDE, factor.second);
}

// x += sign * values * gradients of this thread's tokens
DEVICE void add_products(float (&x)[TOKENS][8], const Tokens& values, const Tokens& gradients,
                         float sign) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float value[8], gradient[8];
        unpack(values.x[i], value), unpack(gradients.x[i], gradient);
#pragma unroll
        for (int c = 0; c < 8; c++) x[i][c] += sign * value[c] * gradient[c];
    }
}

// What the gradient of w is made of.
struct Read { Tokens r, w, k, a, b; };
struct Written { Tokens dr, dk, da, db; };

DEVICE Read load_again(const Inputs& x, const Position& at) {
    return {load_tokens(x.r, at), load_tokens(x.w, at), load_tokens(x.k, at), load_tokens(x.a, at),
            load_tokens(x.b, at)};
}
// The gradients that the block has written
DEVICE Written load_written(const Outputs& d, const Position& at) {
    return {load_tokens(d.r, at), load_tokens(d.k, at), load_tokens(d.a, at), load_tokens(d.b, at)};
}

// A decay scales what comes after it in its document: with x = r dr - k dk - b db + a da, its gradient
// has the sum of x from its token on, without its own a da, and what scales with the leaving state,
// which is the sum of `leaving` (PARTS, N).
template <int PARTS>
DEVICE void decay_gradient(Io* dw, const Position& at, const Read& in, const Written& written,
                           const float* leaving_parts, const Documents& documents, Shared& shared) {
    int warp = warp_index(), group = thread_index() % 32 / 8, token = own_token();
    int last[TOKENS] = {documents.last(token), documents.last(token + 1)};
    int warp_end = (warp + 1) * WARP_TOKENS;
    float x[TOKENS][8] = {}, d[TOKENS][8] = {}, head[8];
    add_products(d, in.a, written.da, -1.0f);
    add_products(x, in.r, written.dr, 1.0f);
    add_products(x, in.k, written.dk, -1.0f);
    add_products(x, in.b, written.db, -1.0f);
#pragma unroll
    for (int c = 0; c < 8; c++) {
#pragma unroll
        for (int i = 0; i < TOKENS; i++) x[i][c] -= d[i][c];
        // sum from the first token to the end of its document or of the warp's tokens
        head[c] = x[0][c] + (last[0] > token ? x[1][c] : 0.0f);
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            float later = shuffle_down(head[c], 8 * step);
            head[c] += group + step < 4 && last[0] >= token + step * TOKENS ? later : 0.0f;
        }
        float later = shuffle_down(head[c], 8);
        x[1][c] += group < 3 && last[1] >= token + TOKENS ? later : 0.0f;
    }
    if (group == 0) write_eight(shared.totals[warp], head);
    sync_block();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // what comes after the warp's tokens in the document of the last of them
        int channel = thread_index() % 32 + 32 * i, end = documents.last(warp_end - 1);
        float sum = 0.0f;
#pragma unroll
        for (int other = 1; other < WARPS; other++)
            if (other > warp && other * WARP_TOKENS <= end) sum += shared.totals[other][channel];
        shared.offsets[warp][channel] = sum;
    }
    sync_warp();
    float rest[8], leaving[8] = {};
    read_eight(rest, shared.offsets[warp]);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        float part[8];
        read_eight(part, leaving_parts + i * N);
#pragma unroll
        for (int c = 0; c < 8; c++) leaving[c] += part[c];
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float gate[8];
        unpack(in.w.x[i], gate);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            d[i][c] += i == 0 ? head[c] : x[1][c];
            d[i][c] += last[i] >= warp_end ? rest[c] : 0.0f;
            d[i][c] += token + i >= documents.leaving ? leaving[c] : 0.0f;
            gate[c] = sigmoid(gate[c]);
            d[i][c] *= -DECAY_SCALE * gate[c] * (1.0f - gate[c]);
        }
        if (token + i < at.length)
            store_eight(dw + at.first + own_channel() + (token + i) * at.stride, d[i]);
    }
}

// One output of the gradients stage: left M + sum of two pair products (left right^T) values, where M
// is the state or its gradient.
struct Task {
    Tile left;
    Pairs pairs, others;
    bool is_later;
    int shift;  // 1: its factor is e^{g_t - m}, 0: e^{g_{t-1} - m}
    Io* output;
};

// Number 0 solves for u or z, 1 gives dv, 2 and 3 the gradients that are scaled by decays: those of r
// and a by the first group of warps, of k and b by the second.
DEVICE Task task(const Outputs& d, int group, int number) {
    bool is_first = group == 0, is_third = number == 3;
    if (number == 0 && is_first) return {At::A, {At::K, At::V, false}, {}, false, 0, nullptr};
    if (number == 0) return {At::B, {At::R, At::DY, true}, {}, true, 0, nullptr};
    if (number == 1) return {At::K, {At::R, At::DY, true}, {At::A, At::Z, false}, true, 0, d.v};
    if (is_first)
        return {is_third ? At::Z : At::DY, {At::V, At::K, !is_third}, {At::U, At::B, !is_third}, false,
                is_third ? 0 : 1, is_third ? d.a : d.r};
    return {is_third ? At::U : At::V, {At::DY, At::R, true}, {At::Z, At::A, false}, true,
            1, is_third ? d.b : d.k};
}

// u = L s, what each token takes out of the state, or z = L^T s, the gradient of that; as a tile
DEVICE void solve(Slab<>& s, int group, int row0) {
    Tile solved = group == 0 ? At::U : At::Z;
    store_tile(solved, row0, s);
    warpgroup::sync_group(1 + group);
    clear(s);
    if (group == 0) warpgroup::add_product(s, At::INVERSE, row0, solved, Range{0, row0 + 16});
    else warpgroup::add_product_transposed(s, At::INVERSE, row0, solved, Range{row0, C});
    warpgroup::sync_group(1 + group);
    store_tile(solved, row0, s);
}

// Gradients of all inputs but w.
DEVICE void input_gradients(const Outputs& d, const Position& at, const Documents& documents) {
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS;
    Slab<> s;
#pragma unroll 1
    for (int number = 0; number < 4; number++) {
        // the groups share dv where each warp multiplies by itself: the second group takes the slabs
        // that look at few tokens
        if (number == 1 && (group == 0) != (WGMMA || slab < GROUP_WARPS / 2)) continue;
        // else the compiler would make the addresses of all tasks at once, in too many registers
        int row0 = computed_here(slab * 16);
        Task todo = task(d, group, number);
        Rows left = load_rows_of(todo.left, row0);
        if (number > 1) warpgroup::set_matrix(s, left, group == 0 ? At::STATE : At::DSTATE);
        else warpgroup::set_transposed(s, left, todo.is_later ? At::DSTATE : At::STATE);
        if (documents.is_packed()) {
            int begin = todo.is_later ? documents.leaving : 0;
            int end = todo.is_later ? C : documents.entering;
            each(s, [&](float& x, int, int row, int) {
                x = row0 + row >= begin && row0 + row < end ? x : 0.0f;
            });
        }
        Bounds limits = bounds(row0 / 16, documents, todo.is_later);
        if (number == 0) {
            warpgroup::add_pairs(s, left, todo.pairs, limits);
            solve(s, group, row0);
            warpgroup::sync_block();
            continue;
        }
        warpgroup::add_pairs(s, left, todo.pairs, todo.others, limits);
        if (number > 1) {
            const float* factor = &shared_at<float>(At::FACTOR) + (row0 + todo.shift) * WIDE;
            if (group == 0) scale_rows<false>(s, factor);
            else scale_rows<true>(s, factor);
        }
        store_rows(todo.output, at, row0, s);
    }
}
