// Backward stages of WKV-7 that are parallel over chunks; the formulas are in ../stages.py.
#include "gradients.cuh"

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
    warpgroup::sync_block();
    Documents documents = read_documents(shared.documents);
    write_decay(p.decay, at, documents, shared);
    if (documents.is_packed()) {
        zero_rows(At::A, documents.entering, C);
        warpgroup::sync_block();
    }

    Slab<> s;
    if (group == 0) {
        clear(s);
        warpgroup::add_product(s, At::INVERSE, row0, At::A, Range{0, row0 + 16});
    }
    warpgroup::sync_group(1 + group);
    if (group == 0) store_tile(At::A, row0, s);
    warpgroup::sync_block();
    if (group == 1) {
        clear(s);
        warpgroup::add_pairs(s, load_rows_of(At::R, row0), Pairs{At::B, At::A, true},
                            bounds(slab, documents, false));
        add_readout(s, At::R, row0, documents, shared.middle);
        sync_warp();  // all lanes have read the rows that are overwritten now
        store_tile(At::R, row0, s);
    }
    warpgroup::sync_group(1 + group);
    if (documents.is_packed()) {
        warpgroup::sync_block();
        zero_rows(At::B, 0, documents.leaving);
        warpgroup::sync_block();
    }
    // X for the gradient of the state, or what is added to it
    for (int i = slab; i < SLABS; i += GROUP_WARPS) {
        clear(s);
        warpgroup::add_product_transposed(s, group == 0 ? At::A : At::DY, i * 16,
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
    Inputs in;
    const int* segments;
    const Op *inverse, *states;
    const float* last_state;
    const Op* dstates;
    const Io* dy;
    Outputs out;
    int T, H, M;
};

// This warp's pieces of the states that enter this chunk and the next, if there is one.
struct Loaded {
    States own;
    Fragment next[PIECES];
};

DEVICE Loaded load_states(const Gradients& p, const Position& at) {
    Loaded s;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int index = i * WARPS + warp_index();
        u64 place = at.matrix * N * N;
        Fragment dstate;
        load(s.own.state[i], piece(p.states + place, index / 4, index % 4));
        load(dstate, piece(p.dstates + place, index / 4, index % 4));
        if (at.chunk != p.M - 1)
            load(s.next[i], piece(p.states + place + N * N, index / 4, index % 4));
#pragma unroll
        for (int j = 0; j < 4; j++)
            get_fragment(dstate, j, s.own.dstate[i][j].x, s.own.dstate[i][j].y);
    }
    return s;
}

// Sum over value rows of the leaving state and its gradient: what scales with the whole decay.
DEVICE void leaving_products(const Gradients& p, const Position& at, const Loaded& s) {
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
    bool is_last = at.chunk == p.M - 1;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int index = i * WARPS + warp, slab = index / 4, k = index % 4;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[2];
            if (is_last) {
                u64 row = (u64)block_y() * N + slab * 16 + g + j / 2 * 8;
                const float* last = p.last_state + row * N + k * 16 + j % 2 * 8 + 2 * q;
                x[0] = last[0], x[1] = last[1];
            } else {
                get_fragment(s.next[i], j, x[0], x[1]);
            }
            FloatPair d = s.own.dstate[i][j];
            sum[j % 2 * 2] += x[0] * d.x, sum[j % 2 * 2 + 1] += x[1] * d.y;
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum[j] += warp_shuffle(sum[j], lanes);
        int column = warp % 4 * 16 + j / 2 * 8 + 2 * q + j % 2;
        if (g == 0) shared_at<float>(At::LEAVING + (warp / 4 * N + column) * 4) = sum[j];
    }
}

DEVICE void load_gradients(const Gradients& p, const Position& at, Shared& shared) {
    Tokens w = load_tokens(p.in.w, at), a = load_tokens(p.in.a, at), b = load_tokens(p.in.b, at);
    Tokens k = load_tokens(p.in.k, at), r = load_tokens(p.in.r, at);
    Tokens v = load_tokens(p.in.v, at), dy = load_tokens(p.dy, at);
    Inverse inverse = load_inverse(p.inverse, at);
    Loaded states = load_states(p, at);
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
    sync_block();  // the first warp has written `middle` and `end`
    put_states(states.own, shared);
}

KERNEL(wkv7_gradients, Gradients, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    load_gradients(p, at, shared);
    warpgroup::sync_block();
    Documents documents = read_documents(shared.documents);
    input_gradients(p.out, at, documents);
    // loaded before the barrier, while other warps still compute
    Read read = load_again(p.in, at);
    warpgroup::sync_block();
    Written written = load_written(p.out, at);
    const float* leaving = &shared_at<float>(At::LEAVING);
    decay_gradient<WARPS / 4>(p.out.w, at, read, written, leaving, documents, shared);
}
