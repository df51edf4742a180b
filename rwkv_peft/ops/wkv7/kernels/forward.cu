// Forward stages of WKV-7 that are parallel over chunks; the formulas are in ../stages.py.
#include "forward.cuh"

struct ChunkForward {
    const Io *r, *w, *k, *v, *a, *b;
    const int* segments;
    Io* y;
    Op *transition, *added;
    float* decay;
    Op *readout, *inverse;
    int T, H, M;
};

DEVICE void load_forward(const ChunkForward& p, const Position& at, Shared& shared) {
    Tokens w = load_tokens(p.w, at), a = load_tokens(p.a, at), b = load_tokens(p.b, at);
    Tokens k = load_tokens(p.k, at), r = load_tokens(p.r, at), v = load_tokens(p.v, at);
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    put_tokens(At::V, v);
    Factors factor = decay_factors(w, at, shared);
    put_scaled(At::A, a, factor.before, factor.first);
    put_scaled(At::R, r, factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, b, factor.first, factor.second);
    put_scaled(At::K, k, factor.first, factor.second);
}

KERNEL(wkv7_chunk_forward, ChunkForward, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS, row0 = slab * 16;
    load_forward(p, at, shared);
    warpgroup::sync_block();
    Documents documents = read_documents(shared.documents);
    write_decay(p.decay, at, documents, shared);
    Bounds earlier = bounds(slab, documents, false);

    Slab<> y, s;
    if (group == 0) {
        Slab<C / 8> pairs;
        warpgroup::set_pairs(pairs, load_rows_of(At::A, row0), At::B, earlier, false);
        invert(pairs, slab);
    } else {
        clear(s);
        warpgroup::add_pairs(s, load_rows_of(At::A, row0), Pairs{At::K, At::V, false}, earlier);
        store_tile(At::U, row0, s);
        clear(y);
        warpgroup::add_pairs(y, load_rows_of(At::R, row0), Pairs{At::K, At::V, true}, earlier);
        // compute-sanitizer orders two groups by how many barriers each has passed
        for (int turn = 1; turn < GROUP_WARPS; turn++) sync_group(2, GROUP_THREADS);
    }
    warpgroup::sync_block();
    documents = read_documents(shared.documents);  // again, as registers are few
    if (documents.is_packed()) {
        zero_rows(At::A, documents.entering, C);
        warpgroup::sync_block();
    }

    // u is what each token takes out of the state: of the entering one, and of the chunk's own values
    Tile solved = group == 0 ? At::A : At::U;
    clear(s);
    warpgroup::add_product(s, At::INVERSE, row0, solved, Range{0, row0 + 16});
    warpgroup::sync_group(1 + group);
    store_tile(solved, row0, s);
    warpgroup::sync_group(1 + group);

    earlier = bounds(slab, documents, false);
    if (group == 0) clear(y);
    warpgroup::add_pairs(y, load_rows_of(At::R, row0), Pairs{At::B, solved, true}, earlier);
    if (group == 0) {
        add_readout(y, At::R, row0, documents, shared.middle);
        store_left(p.readout + at.matrix * C * N, slab, y);
        if (p.inverse) store_inverse(p.inverse, at, slab);
    } else {
        store_rows(p.y, at, row0, y);
    }
    if (documents.is_packed()) {
        warpgroup::sync_block();
        zero_rows(At::B, 0, documents.leaving);
        zero_rows(At::K, 0, documents.leaving);
        warpgroup::sync_block();
    }

    // X^T for the state, or what is added to it
    for (int i = slab; i < SLABS; i += GROUP_WARPS) {
        clear(s);
        warpgroup::add_product_transposed(s, group == 0 ? At::B : At::U, i * 16,
                                         group == 0 ? At::A : At::B, Range{0, C});
        if (group == 1) {
            warpgroup::add_product_transposed(s, At::V, i * 16, At::K, Range{0, C});
            each(s, [&](float& x, int, int, int c) { x *= shared.end[c]; });
            store_left(p.added + at.matrix * N * N, i, s);
        } else {
            int row = i * 16 + thread_index() % 32 / 4;
            float end[2] = {shared.end[row], shared.end[row + 8]};
            each(s, [&](float& x, int half, int, int c) { x *= end[half] * shared.middle[c]; });
            store_right(p.transition + at.matrix * N * N, i, s);
        }
    }
}

struct Output {
    const Op *readout, *states;
    Io* y;
    int T, H, M;
};

// y += readout state^T, a warp for 16 tokens, all operands as fragments straight from memory.
KERNEL(wkv7_output, Output, GROUP_THREADS, 1) {
    Position at = position(p.T, p.H, p.M, block_x());
    int slab = warp_index();
    if (slab * 16 >= at.length) return;
    Slab<> y;
    load_rows(y, p.y, at, slab * 16);
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        Fragment left;
        load(left, piece(p.readout + at.matrix * C * N, slab, k));
#pragma unroll
        for (int j = 0; j < SLABS; j++) {
            Fragment right;
            load(right, piece(p.states + at.matrix * N * N, j, k));
            mma(y.x[2 * j], left, right, 0);
            mma(y.x[2 * j + 1], left, right, 1);
        }
    }
    store_rows(p.y, at, slab * 16, y);
}
