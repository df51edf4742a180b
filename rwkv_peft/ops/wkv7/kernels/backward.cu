// Backward stages of WKV-7 that are parallel over chunks; the formulas are in ../stages.py.
#include "decay.cuh"

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

struct ChunkBackward {
    const Io *r, *w, *a, *b;
    const int* segments;
    const Op* inverse;
    const Io* dy;
    Op *transition, *added;
    float* decay;
    int T, H, M;
};

struct BackwardMemory {
    enum : u32 {
        TILE = tile_bytes(C),
        A = 0, R = TILE, B = 2 * TILE, DY = 3 * TILE, INVERSE = 4 * TILE,
        SHARED = 5 * TILE,
        BYTES = SHARED + sizeof(Shared),
    };
};

// What the reverse pass over the chunks needs: transition again, and the gradient that dy gives.
KERNEL(wkv7_chunk_backward, ChunkBackward, THREADS, 3) {
    typedef BackwardMemory At;
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS, row0 = slab * 16;
    {
        Tokens w = load_tokens(p.w, at), a = load_tokens(p.a, at), b = load_tokens(p.b, at);
        Tokens r = load_tokens(p.r, at), dy = load_tokens(p.dy, at);
        Inverse inverse = load_inverse(p.inverse, at);
        write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
        put_inverse(At::INVERSE, inverse);
        put_tokens(At::DY, dy);
        Factors factor = decay_factors(w, at, shared);
        put_scaled(At::A, a, factor.before, factor.first);
        put_scaled(At::R, r, factor.first, factor.second);
        factor.invert();
        put_scaled(At::B, b, factor.first, factor.second);
    }
    together::sync_block();
    Documents documents = read_documents(shared.documents);
    write_decay(p.decay, at, documents, shared);
    if (documents.is_packed()) {
        zero_rows(At::A, documents.entering, C);
        together::sync_block();
    }

    Slab<> s;
    if (group == 0) {
        clear(s);
        together::add_product(s, At::INVERSE, row0, At::A, Range{0, row0 + 16});
    }
    together::sync_group(1 + group);
    if (group == 0) store_tile(At::A, row0, s);
    together::sync_block();
    if (group == 1) {
        clear(s);
        together::add_pairs(s, load_rows_of(At::R, row0), Pairs{At::B, At::A, true},
                            bounds(slab, documents, false));
        add_readout(s, At::R, row0, documents, shared.middle);
        sync_warp();  // all lanes have read the rows that are written now
        store_tile(At::R, row0, s);
    }
    together::sync_group(1 + group);
    if (documents.is_packed()) {
        together::sync_block();
        zero_rows(At::B, 0, documents.leaving);
        together::sync_block();
    }
    // X for the gradient of the state, or what is added to it
    for (int i = slab; i < SLABS; i += GROUP_WARPS) {
        clear(s);
        together::add_product_transposed(s, group == 0 ? At::A : At::DY, i * 16,
                                         group == 0 ? At::B : At::R, Range{0, C});
        if (group == 1) {
            store_left(p.added + at.matrix * N * N, i, s);
        } else {
            int row = i * 16 + thread_index() % 32 / 4;
            float middle[2] = {shared.middle[row], shared.middle[row + 8]};
            each(s, [&](float& x, int half, int, int c) { x *= middle[half] * shared.end[c]; });
            store_right(p.transition + at.matrix * N * N, i, s);
        }
    }
}

struct Gradients {
    const Io *r, *w, *k, *v, *a, *b;
    const int* segments;
    const Op *inverse, *states;
    const float* last_state;
    const Op* dstates;
    const Io* dy;
    Io *dr, *dw, *dk, *dv, *da, *db;
    int T, H, M;
};

constexpr int WIDE = N + 8;  // of float32 rows, so that eight rows meet all banks

struct GradientMemory {
    enum : u32 {
        TILE = tile_bytes(C), MATRIX = tile_bytes(N),
        A = 0, R = TILE, B = 2 * TILE, K = 3 * TILE, V = 4 * TILE, DY = 5 * TILE, U = 6 * TILE,
        Z = 7 * TILE, INVERSE = 8 * TILE, STATE = 9 * TILE, DSTATE = STATE + MATRIX,
        FACTOR = DSTATE + MATRIX,               // float[C + 1][WIDE]: e^{g_{t-1} - m}
        SHARED = FACTOR + (C + 1) * WIDE * 4,
        LEAVING = SHARED + sizeof(Shared),      // float[WARPS / 4][N], or [2][GROUP_WARPS][N] of the walk
        BYTES = LEAVING + WARPS / 4 * N * 4,
        WALK_BYTES = LEAVING + 2 * GROUP_WARPS * N * 4,
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

// This warp's pieces of the state that enters the chunk, the gradient of the one that leaves it, and
// the state that enters the next chunk, if there is one.
static_assert(WARPS % 4 == 0, "a warp has pieces of one column");
constexpr int PIECES = 16 / WARPS;
struct States {
    Fragment state[PIECES], dstate[PIECES], next[PIECES];
    DEVICE void gradient(int i, int j, float& x, float& y) const { get_fragment(dstate[i], j, x, y); }
};

DEVICE States load_states(const Gradients& p, const Position& at) {
    States s;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int index = i * WARPS + warp_index();
        u64 place = at.matrix * N * N;
        load(s.state[i], piece(p.states + place, index / 4, index % 4));
        load(s.dstate[i], piece(p.dstates + place, index / 4, index % 4));
        if (at.chunk != p.M - 1)
            load(s.next[i], piece(p.states + place + N * N, index / 4, index % 4));
    }
    return s;
}

// Sum over value rows of the leaving state and its gradient: what scales with the whole decay.
DEVICE void leaving_products(const Gradients& p, const Position& at, const States& s) {
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
    bool is_last = at.chunk == p.M - 1;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int index = i * WARPS + warp, slab = index / 4, k = index % 4;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[2], d[2];
            if (is_last) {
                u64 row = (u64)block_y() * N + slab * 16 + g + j / 2 * 8;
                const float* last = p.last_state + row * N + k * 16 + j % 2 * 8 + 2 * q;
                x[0] = last[0], x[1] = last[1];
            } else {
                get_fragment(s.next[i], j, x[0], x[1]);
            }
            get_fragment(s.dstate[i], j, d[0], d[1]);
            sum[j % 2 * 2] += x[0] * d[0], sum[j % 2 * 2 + 1] += x[1] * d[1];
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum[j] += warp_shuffle(sum[j], lanes);
        if (g == 0) shared_at<float>(At::LEAVING + (warp / 4 * N + warp % 4 * 16 + j / 2 * 8 + 2 * q + j % 2) * 4) =
                sum[j];
    }
}

// Both measured from the chunk's middle, as tiles.
template <class States> DEVICE void put_states(const States& s, const Shared& shared) {
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
            float x[2], d[2];
            get_fragment(s.state[i], j, x[0], x[1]);
            s.gradient(i, j, d[0], d[1]);
            set_pair(At::STATE, row, column, x[0] * middle[j % 2].x, x[1] * middle[j % 2].y);
            set_pair(At::DSTATE, row, column, d[0] * end[j % 2].x, d[1] * end[j % 2].y);
        }
}

// e^{g_{t-1} - m} of this thread's tokens, as rows
DEVICE void put_factors(const Factors& factor) {
    float* rows = &shared_at<float>(At::FACTOR) + own_token() * WIDE;
    write_eight(rows, factor.before);
    write_eight(rows + WIDE, factor.first);
    if (own_token() == C - TOKENS) write_eight(rows + 2 * WIDE, factor.second);
}

DEVICE void load_gradients(const Gradients& p, const Position& at, Shared& shared) {
    Tokens w = load_tokens(p.w, at), a = load_tokens(p.a, at), b = load_tokens(p.b, at);
    Tokens k = load_tokens(p.k, at), r = load_tokens(p.r, at);
    Tokens v = load_tokens(p.v, at), dy = load_tokens(p.dy, at);
    Inverse inverse = load_inverse(p.inverse, at);
    States states = load_states(p, at);
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    put_inverse(At::INVERSE, inverse);
    put_tokens(At::V, v);
    put_tokens(At::DY, dy);
    Factors factor = decay_factors(w, at, shared);
    put_factors(factor);
    put_scaled(At::A, a, factor.before, factor.first);
    put_scaled(At::R, r, factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, b, factor.first, factor.second);
    put_scaled(At::K, k, factor.first, factor.second);
    leaving_products(p, at, states);
    sync_block();  // for middle and end, which the first warp writes
    put_states(states, shared);
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

// What the gradient of w is made of beside gradients.
struct Inputs { Tokens r, w, k, a, b; };
struct Written { Tokens dr, dk, da, db; };

// Gradient of w from the gradients that the block has written; `leaving` (parts, N) adds up to what
// scales with the leaving state. A decay scales what comes after it in
// its document: with x = r dr - k dk - b db + a da, it has the sum of x from its token on, without
// its own a da, and what scales with the leaving state.
template <int PARTS, class Args>
DEVICE void decay_gradient(const Args& p, const Position& at, const Inputs& in, const Written& written, const float* leaving_parts,
                           const Documents& documents, Shared& shared) {
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
            store_eight(p.dw + at.first + own_channel() + (token + i) * at.stride, d[i]);
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
template <class Args> DEVICE Task task(const Args& p, int group, int number) {
    bool is_first = group == 0, is_third = number == 3;
    if (number == 0 && is_first) return {At::A, {At::K, At::V, false}, {}, false, 0, nullptr};
    if (number == 0) return {At::B, {At::R, At::DY, true}, {}, true, 0, nullptr};
    if (number == 1) return {At::K, {At::R, At::DY, true}, {At::A, At::Z, false}, true, 0, p.dv};
    if (is_first)
        return {is_third ? At::Z : At::DY, {At::V, At::K, !is_third}, {At::U, At::B, !is_third}, false,
                is_third ? 0 : 1, is_third ? p.da : p.dr};
    return {is_third ? At::U : At::V, {At::DY, At::R, true}, {At::Z, At::A, false}, true,
            1, is_third ? p.db : p.dk};
}

// u = L s, what each token takes out of the state, or z = L^T s, the gradient of that; as a tile
DEVICE void solve(Slab<>& s, int group, int row0) {
    Tile solved = group == 0 ? At::U : At::Z;
    store_tile(solved, row0, s);
    together::sync_group(1 + group);
    clear(s);
    if (group == 0) together::add_product(s, At::INVERSE, row0, solved, Range{0, row0 + 16});
    else together::add_product_transposed(s, At::INVERSE, row0, solved, Range{row0, C});
    together::sync_group(1 + group);
    store_tile(solved, row0, s);
}

// Gradients of all inputs but w.
template <class Args>
DEVICE void input_gradients(const Args& p, const Position& at, const Documents& documents) {
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS;
    Slab<> s;
#pragma unroll 1
    for (int number = 0; number < 4; number++) {
        // dv is shared where warps multiply alone: the second group has the slabs that look at few
        // tokens
        if (number == 1 && (group == 0) != (WGMMA || slab < GROUP_WARPS / 2)) continue;
        // addresses of all tasks at once would not fit the registers
        int row0 = computed_here(slab * 16);
        Task todo = task(p, group, number);
        Rows left = load_rows_of(todo.left, row0);
        if (number > 1) together::set_matrix(s, left, group == 0 ? At::STATE : At::DSTATE);
        else together::set_transposed(s, left, todo.is_later ? At::DSTATE : At::STATE);
        if (documents.is_packed()) {
            int begin = todo.is_later ? documents.leaving : 0;
            int end = todo.is_later ? C : documents.entering;
            each(s, [&](float& x, int, int row, int) {
                x = row0 + row >= begin && row0 + row < end ? x : 0.0f;
            });
        }
        Bounds limits = bounds(row0 / 16, documents, todo.is_later);
        if (number == 0) {
            together::add_pairs(s, left, todo.pairs, limits);
            solve(s, group, row0);
            together::sync_block();
            continue;
        }
        together::add_pairs(s, left, todo.pairs, todo.others, limits);
        if (number > 1) {
            const float* factor = &shared_at<float>(At::FACTOR) + (row0 + todo.shift) * WIDE;
            if (group == 0) scale_rows<false>(s, factor);
            else scale_rows<true>(s, factor);
        }
        store_rows(todo.output, at, row0, s);
    }
}

template <class Args> DEVICE Written load_written(const Args& p, const Position& at) {
    return {load_tokens(p.dr, at), load_tokens(p.dk, at), load_tokens(p.da, at), load_tokens(p.db, at)};
}

DEVICE Inputs load_inputs(const Io* r, const Io* w, const Io* k, const Io* a, const Io* b, const Position& at) {
    return {load_tokens(r, at), load_tokens(w, at), load_tokens(k, at), load_tokens(a, at), load_tokens(b, at)};
}

KERNEL(wkv7_gradients, Gradients, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    load_gradients(p, at, shared);
    together::sync_block();
    Documents documents = read_documents(shared.documents);
    input_gradients(p, at, documents);
    // loaded while other warps are at work
    Inputs inputs = load_inputs(p.r, p.w, p.k, p.a, p.b, at);
    together::sync_block();
    Written written = load_written(p, at);
    decay_gradient<WARPS / 4>(p, at, inputs, written, &shared_at<float>(At::LEAVING), documents, shared);
}

struct WalkBackward {
    const Io *r, *w, *k, *v, *a, *b;
    const int* segments;
    const Op *inverse, *states;
    const float *last_state, *dlast_state;
    const Io* dy;
    Io *dr, *dw, *dk, *dv, *da, *db;
    float* dstate;  // (B, H, N, N): of the state between two chunks, in the end of the initial one
    int T, H, M;
};

// Copies a chunk's tensors to shared memory, each thread what it reads later: in between no other
// thread looks at it. w is in the place of u, the inverse in that of z, the state in that of its gradient.
DEVICE void fetch(const WalkBackward& p, const Position& at) {
    fetch_tokens(At::U, p.w, at);
    fetch_tokens(At::A, p.a, at);
    fetch_tokens(At::B, p.b, at);
    fetch_tokens(At::K, p.k, at);
    fetch_tokens(At::R, p.r, at);
    fetch_tokens(At::V, p.v, at);
    fetch_tokens(At::DY, p.dy, at);
    int warp = warp_index();
#pragma unroll
    for (int i = 0; i < INVERSE_PIECES; i++) {
        int index = i * WARPS + warp;
        fetch_piece(At::Z, index, piece(p.inverse + at.matrix * C * C, index / (C / 16), index % (C / 16), C / 16));
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int index = i * WARPS + warp;
        fetch_piece(At::DSTATE, index, piece(p.states + at.matrix * N * N, index / 4, index % 4));
    }
    commit_copies();
}

// As above; the gradient is the one that the block has written.
struct WalkStates {
    Fragment state[PIECES];
    FloatPair dstate[PIECES][4];
    DEVICE void gradient(int i, int j, float& x, float& y) const { x = dstate[i][j].x, y = dstate[i][j].y; }
};

DEVICE void load_fetched(const WalkBackward& p, const Position& at, Shared& shared) {
    WalkStates states;
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int index = i * WARPS + warp;
            u64 row = (u64)block_y() * N + index / 4 * 16 + g + j / 2 * 8;
            states.dstate[i][j] = *(const FloatPair*)(p.dstate + row * N + index % 4 * 16 + j % 2 * 8 + 2 * q);
        }
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    wait_copies<0>();
    Inverse inverse;
#pragma unroll
    for (int i = 0; i < INVERSE_PIECES; i++) inverse.f[i] = fetched_piece(At::Z, i * WARPS + warp);
    put_inverse(At::INVERSE, inverse);
#pragma unroll
    for (int i = 0; i < PIECES; i++) states.state[i] = fetched_piece(At::DSTATE, i * WARPS + warp);
    if (IO != 0) put_tokens(At::V, fetched_tokens(At::V)), put_tokens(At::DY, fetched_tokens(At::DY));
    Factors factor = decay_factors(fetched_tokens(At::U), at, shared);
    put_factors(factor);
    put_scaled(At::A, fetched_tokens(At::A), factor.before, factor.first);
    put_scaled(At::R, fetched_tokens(At::R), factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, fetched_tokens(At::B), factor.first, factor.second);
    put_scaled(At::K, fetched_tokens(At::K), factor.first, factor.second);
    sync_block();  // for middle and end, which the first warp writes
    put_states(states, shared);
}

// Products of a state and its gradient, summed over the value rows of this thread: of column 8 j + 2 q
// in x[2 j], of the next in x[2 j + 1].
struct Columns { float x[N / 4]; };

// A lane gives away half of the sums that it has, and gets the other half of another lane's.
template <int COUNT> DEVICE void halve(Columns& sum, int& first, int lanes) {
    bool is_upper = thread_index() & lanes;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float given = is_upper ? sum.x[i] : sum.x[i + COUNT];
        sum.x[i] = (is_upper ? sum.x[i + COUNT] : sum.x[i]) + warp_shuffle(given, lanes);
    }
    first += is_upper ? COUNT : 0;
}
DEVICE void put_columns(Columns& sum, float* leaving) {
    int first = 0;
    halve<8>(sum, first, 16);
    halve<4>(sum, first, 8);
    halve<2>(sum, first, 4);
    *(FloatPair*)(leaving + first / 2 * 8 + thread_index() % 4 * 2) = FloatPair{sum.x[0], sum.x[1]};
}

DEVICE void begin_walk(const WalkBackward& p, int slab, float* leaving) {
    Columns sum = {};
    for (int i = slab; i < SLABS; i += GROUP_WARPS)
        each_pair([&](int j, int, int row, int c) {
            u64 place = ((u64)block_y() * N + i * 16 + row) * N + c;
            FloatPair d{0.0f, 0.0f}, x = *(const FloatPair*)(p.last_state + place);
            if (p.dlast_state) d = *(const FloatPair*)(p.dlast_state + place);
            store_global(p.dstate + place, d);
            sum.x[2 * j] += x.x * d.x, sum.x[2 * j + 1] += x.y * d.y;
        });
    put_columns(sum, leaving);
}

// The gradient of the state that enters the chunk, from that of the leaving one.
DEVICE void step_back(const WalkBackward& p, const Documents& d, int slab, const Shared& shared,
                      float* leaving) {
    Columns sum = {};
    for (int i = slab; i < SLABS; i += GROUP_WARPS) {
        Slab<> s;
        float* dstate = p.dstate + ((u64)block_y() * N + i * 16) * N;
        each_pair([&](int j, int half, int row, int c) {
            FloatPair x = *(const FloatPair*)(dstate + row * N + c);
            s.x[j][2 * half] = d.is_carried() ? x.x * shared.end[c] : 0.0f;
            s.x[j][2 * half + 1] = d.is_carried() ? x.y * shared.end[c + 1] : 0.0f;
        });
        together::add_product_transposed(s, At::DY, i * 16, At::R, Range{0, C});
        together::add_product_transposed(s, At::Z, i * 16, At::A, Range{0, C});
        each_pair([&](int j, int half, int row, int c) {
            float x, y, *pair = s.x[j] + 2 * half;
            get_pair(At::STATE, i * 16 + row, c, x, y);
            sum.x[2 * j] += x * pair[0], sum.x[2 * j + 1] += y * pair[1];
            store_global(dstate + row * N + c,
                         FloatPair{pair[0] * shared.middle[c], pair[1] * shared.middle[c + 1]});
        });
    }
    put_columns(sum, leaving);
}

// All stages at once: a block goes back through the chunks of a head.
KERNEL(wkv7_walk_backward, WalkBackward, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS;
    // what scales with the leaving state: of this chunk, and of the one before
    float *leaving = &shared_at<float>(At::LEAVING), *earlier = leaving + GROUP_WARPS * N;
    if (group == 1) begin_walk(p, slab, leaving + slab * N);
    fetch(p, position(p.T, p.H, p.M, p.M - 1));
    sync_block();
#pragma unroll 1
    for (int chunk = p.M - 1; chunk >= 0; chunk--) {
        Position at = position(p.T, p.H, p.M, chunk);
        load_fetched(p, at, shared);
        together::sync_block();
        Documents documents = read_documents(shared.documents);
        input_gradients(p, at, documents);
        if (documents.is_packed()) {
            together::sync_block();
            zero_rows(At::R, documents.entering, C);
            zero_rows(At::A, documents.entering, C);
            together::sync_block();
        }
        if (group == 1) step_back(p, documents, slab, shared, earlier + slab * N);
        Inputs inputs = load_inputs(p.r, p.w, p.k, p.a, p.b, at);
        together::sync_block();
        Written written = load_written(p, at);
        if (chunk > 0) fetch(p, position(p.T, p.H, p.M, chunk - 1));
        decay_gradient<GROUP_WARPS>(p, at, inputs, written, leaving, documents, shared);
        sync_block();
        float* next = earlier;
        earlier = leaving, leaving = next;
    }
}
