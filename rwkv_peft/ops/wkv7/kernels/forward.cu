// Forward stages of WKV-7 that are parallel over chunks; the formulas are in ../stages.py.
#include "decay.cuh"

struct ForwardMemory {
    enum : u32 {
        TILE = tile_bytes(C),
        A = 0, R = TILE, B = 2 * TILE, K = 3 * TILE, V = 4 * TILE, U = 5 * TILE, INVERSE = 6 * TILE,
        SCRATCH = 7 * TILE,  // float[GROUP_WARPS][16][17]
        SHARED = SCRATCH + GROUP_WARPS * 16 * 17 * 4,
        BYTES = SHARED + sizeof(Shared),
        STATE = (BYTES + 1023) / 1024 * 1024,  // of the walk
        EXACT = STATE + tile_bytes(N),  // float[N][N] of the walk, as the first group's threads have it
        NEXT_K = EXACT + N * N * 4, NEXT_R = NEXT_K + TILE, NEXT_V = NEXT_R + TILE,
        WALK_BYTES = NEXT_V + TILE,
    };
};
typedef ForwardMemory At;

// (I - pairs)^-1, this warp's 16 rows of the tile. Diagonal blocks by substitution in float32; a
// block below by L_ij = L_ii sum_k A_ik L_kj, row after row of blocks.
DEVICE void invert(const Slab<C / 8>& pairs, int slab) {
    int lane = thread_index() % 32, g = lane / 4, q = lane % 4, row0 = slab * 16;
    float* block = &shared_at<float>(At::SCRATCH + slab * 16 * 17 * 4);
#pragma unroll
    for (int j = 0; j < C / 8; j++)
        if (j / 2 == slab)
#pragma unroll
            for (int i = 0; i < 4; i++)
                block[(g + i / 2 * 8) * 17 + j % 2 * 8 + 2 * q + i % 2] = pairs.x[j][i];
    sync_warp();
    float x[16];  // column lane % 16 of the inverse
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = i == lane % 16 ? 1.0f : 0.0f;
#pragma unroll
    for (int k = 0; k < 15; k++)
#pragma unroll
        for (int i = k + 1; i < 16; i++) x[i] += block[i * 17 + k] * x[k];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int row = row0 + i + lane / 16 * 8;
        shared_at<Op>(At::INVERSE, place(row, row0 + lane % 16)) =
            to_operand(lane < 16 ? x[i] : x[i + 8]);
    }
    for (int turn = 1; turn < GROUP_WARPS; turn++) {
        sync_group(1, GROUP_THREADS);
        if (turn != slab) continue;
        Fragment own;
        load_left(own, At::INVERSE, row0, row0);
        for (int j = 0; j < slab; j++) {
            Slab<2> sum;  // transposed
            clear(sum);
#pragma unroll
            for (int k = 0; k < GROUP_WARPS - 1; k++)
                if (k >= j && k < slab) {
                    Fragment left, right = as_right(fragment(pairs, k));
                    load_left_transposed(left, At::INVERSE, k * 16, j * 16);
                    mma(sum.x[0], left, right, 0);
                    mma(sum.x[1], left, right, 1);
                }
            Slab<2> result;
            clear(result);
            Fragment right = as_right(fragment(sum, 0));
            mma(result.x[0], own, right, 0);
            mma(result.x[1], own, right, 1);
#pragma unroll
            for (int i = 0; i < 4; i++)
                set_pair(At::INVERSE, row0 + g + i % 2 * 8, j * 16 + i / 2 * 8 + 2 * q,
                         result.x[i / 2][i % 2 * 2], result.x[i / 2][i % 2 * 2 + 1]);
        }
    }
    sync_warp();
}

// This warp's rows, of the blocks on and below the diagonal
DEVICE void store_inverse(Op* inverse, const Position& at, int slab) {
    for (int k = 0; k <= slab; k++) {
        Fragment f;
        load_left(f, At::INVERSE, slab * 16, k * 16);
        store(piece(inverse + at.matrix * C * C, slab, k, C / 16), f);
    }
}

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
    together::sync_block();
    Documents documents = read_documents(shared.documents);
    write_decay(p.decay, at, documents, shared);

    Bounds earlier = bounds(slab, documents, false);
    Slab<> y, s;
    if (group == 0) {
        Slab<C / 8> pairs;
        together::set_pairs(pairs, load_rows_of(At::A, row0), At::B, earlier, false);
        invert(pairs, slab);
    } else {
        clear(s);
        together::add_pairs(s, load_rows_of(At::A, row0), Pairs{At::K, At::V, false}, earlier);
        store_tile(At::U, row0, s);
        clear(y);
        together::add_pairs(y, load_rows_of(At::R, row0), Pairs{At::K, At::V, true}, earlier);
        // compute-sanitizer orders two groups by how many barriers each has passed
        for (int turn = 1; turn < GROUP_WARPS; turn++) sync_group(2, GROUP_THREADS);
    }
    together::sync_block();
    if (documents.is_packed()) {
        zero_rows(At::A, documents.entering, C);
        together::sync_block();
    }

    // u is what each token takes out of the state: of the entering one, and of the chunk's own values
    Tile solved = group == 0 ? At::A : At::U;
    clear(s);
    together::add_product(s, At::INVERSE, row0, solved, Range{0, row0 + 16});
    together::sync_group(1 + group);
    store_tile(solved, row0, s);
    together::sync_group(1 + group);

    if (group == 0) clear(y);
    together::add_pairs(y, load_rows_of(At::R, row0), Pairs{At::B, solved, true}, earlier);
    if (group == 0) {
        add_readout(y, At::R, row0, documents, shared.middle);
        store_left(p.readout + at.matrix * C * N, slab, y);
        if (p.inverse) store_inverse(p.inverse, at, slab);
    } else {
        store_rows(p.y, at, row0, y);
    }
    if (documents.is_packed()) {
        together::sync_block();
        zero_rows(At::B, 0, documents.leaving);
        zero_rows(At::K, 0, documents.leaving);
        together::sync_block();
    }

    // X^T for the state, or what is added to it
    for (int i = slab; i < SLABS; i += GROUP_WARPS) {
        clear(s);
        together::add_product_transposed(s, group == 0 ? At::B : At::U, i * 16,
                                         group == 0 ? At::A : At::B, Range{0, C});
        if (group == 1) {
            together::add_product_transposed(s, At::V, i * 16, At::K, Range{0, C});
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

struct WalkForward {
    const Io *r, *w, *k, *v, *a, *b;
    const int* segments;
    const float* initial;
    Io* y;
    Op *states, *inverse;
    float* last;
    int T, H, M;
};

// s = 0 in rows of tokens that do not see the entering state
DEVICE void mask_entering(Slab<>& s, int row0, const Documents& d) {
    if (d.is_packed())
        each(s, [&](float& x, int, int row, int) { x = row0 + row < d.entering ? x : 0.0f; });
}

// The state in float32, rows of one slab as this thread has them of a result. No other thread reads it.
DEVICE float* exact_state(int slab) {
    return &shared_at<float>(At::EXACT) + (slab * (N / 8) * 32 + thread_index() % 32) * 4;
}
DEVICE void load_exact(Slab<>& s, int slab) {
    const float* here = exact_state(slab);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        FloatFour x = *(const FloatFour*)(here + j * 32 * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) s.x[j][i] = x.x[i];
    }
}
DEVICE void store_exact(const Slab<>& s, int slab) {
    float* here = exact_state(slab);
#pragma unroll
    for (int j = 0; j < N / 8; j++)
        *(FloatFour*)(here + j * 32 * 4) = FloatFour{s.x[j][0], s.x[j][1], s.x[j][2], s.x[j][3]};
}

// A chunk's tensors on their way to shared memory, to where there is room before the one before is done.
DEVICE void fetch(const WalkForward& p, const Position& at) {
    fetch_tokens(At::INVERSE, p.w, at);
    fetch_tokens(At::A, p.a, at);
    fetch_tokens(At::STATE, p.b, at);
    fetch_tokens(At::NEXT_K, p.k, at);
    fetch_tokens(At::NEXT_R, p.r, at);
    fetch_tokens(At::NEXT_V, p.v, at);
    commit_copies();
}

DEVICE void load_fetched(const WalkForward& p, const Position& at, Shared& shared) {
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    wait_copies<0>();
    put_tokens(At::V, fetched_tokens(At::NEXT_V));
    Tokens b = fetched_tokens(At::STATE);  // others write the state there
    Factors factor = decay_factors(fetched_tokens(At::INVERSE), at, shared);
    put_scaled(At::A, fetched_tokens(At::A), factor.before, factor.first);
    put_scaled(At::R, fetched_tokens(At::NEXT_R), factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, b, factor.first, factor.second);
    put_scaled(At::K, fetched_tokens(At::NEXT_K), factor.first, factor.second);
}

// All stages at once: a block goes through the chunks of a head. The first group of warps has the
// state, the second y.
KERNEL(wkv7_walk_forward, WalkForward, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    int group = warp_index() / GROUP_WARPS, own_slab = warp_index() % GROUP_WARPS;
    Slab<> s;
    if (group == 0)
        for (int i = own_slab; i < SLABS; i += GROUP_WARPS) {
            clear(s);
            const float* initial = p.initial + ((u64)block_y() * N + i * 16) * N;
            if (p.initial) each(s, [&](float& x, int, int row, int c) { x = initial[row * N + c]; });
            store_exact(s, i);
        }
    fetch(p, position(p.T, p.H, p.M, 0));
#pragma unroll 1
    for (int chunk = 0; chunk < p.M; chunk++) {
        Position at = position(p.T, p.H, p.M, chunk);
        // addresses of a whole chunk, made before the loop, would not fit the registers
        int slab = computed_here(own_slab), row0 = slab * 16;
        load_fetched(p, at, shared);
        if (group == 0) {
            sync_group(1, GROUP_THREADS);  // for middle, which the first warp writes
            for (int i = slab; i < SLABS; i += GROUP_WARPS) {
                load_exact(s, i);
                if (p.states) store_right(p.states + at.matrix * N * N, i, s);
                each(s, [&](float& x, int, int, int c) { x *= shared.middle[c]; });
                store_tile(At::STATE, i * 16, s);
            }
        }
        together::sync_block();
        Documents documents = read_documents(shared.documents);
        Bounds earlier = bounds(slab, documents, false);
        if (group == 0) {
            Slab<C / 8> pairs;
            together::set_pairs(pairs, load_rows_of(At::A, row0), At::B, earlier, false);
            invert(pairs, slab);
        } else {
            Rows left = load_rows_of(At::A, row0);
            together::set_transposed(s, left, At::STATE);
            mask_entering(s, row0, documents);
            together::add_pairs(s, left, Pairs{At::K, At::V, false}, earlier);
            store_tile(At::U, row0, s);
            left = load_rows_of(At::R, row0);
            together::set_transposed(s, left, At::STATE);
            mask_entering(s, row0, documents);
            together::add_pairs(s, left, Pairs{At::K, At::V, true}, earlier);
            // compute-sanitizer orders two groups by how many barriers each has passed
            for (int turn = 0; turn < GROUP_WARPS; turn++) sync_group(2, GROUP_THREADS);
        }
        together::sync_block();

        // u is what each token takes out of the state
        if (group == 0) {
            clear(s);
            together::add_product(s, At::INVERSE, row0, At::U, Range{0, row0 + 16});
            together::sync_group(1);
            store_tile(At::U, row0, s);
            if (p.inverse) store_inverse(p.inverse, at, slab);
        }
        together::sync_block();

        if (chunk + 1 < p.M) fetch(p, position(p.T, p.H, p.M, chunk + 1));
        if (group == 1) {
            together::add_pairs(s, load_rows_of(At::R, row0), Pairs{At::B, At::U, true}, earlier);
            store_rows(p.y, at, row0, s);
        }
        if (documents.is_packed()) {
            together::sync_block();
            zero_rows(At::B, 0, documents.leaving);
            zero_rows(At::K, 0, documents.leaving);
            together::sync_block();
        }
        if (group == 0)
            for (int i = slab; i < SLABS; i += GROUP_WARPS) {
                load_exact(s, i);
                bool is_carried = documents.is_carried();
                each(s, [&](float& x, int, int, int c) { x = is_carried ? x * shared.middle[c] : 0.0f; });
                together::add_product_transposed(s, At::U, i * 16, At::B, Range{0, C});
                together::add_product_transposed(s, At::V, i * 16, At::K, Range{0, C});
                each(s, [&](float& x, int, int, int c) { x *= shared.end[c]; });
                store_exact(s, i);
            }
        together::sync_block();
    }
    if (group == 0)
        for (int i = own_slab; i < SLABS; i += GROUP_WARPS) {
            load_exact(s, i);
            float* last = p.last + ((u64)block_y() * N + i * 16) * N;
            each(s, [&](float& x, int, int row, int c) { last[row * N + c] = x; });
        }
}
