// WKV-7's forward pass as a persistent kernel: a block goes through all chunks of a head, keeps the
// state in float32 in shared memory, and fetches a chunk while it finishes the one before. Only results
// and what the backward pass needs are written. It pays where there are enough heads to fill the GPU.
#include "forward.cuh"

static_assert(IO == 0 && C == 64, "a warp has one slab of the state; other builds are not faster");

struct PersistentMemory : ForwardMemory {
    enum : u32 {
        STATE = (ForwardMemory::BYTES + 1023) / 1024 * 1024,
        EXACT = STATE + tile_bytes(N),  // float[N][N], as the threads of the first group have it
        K_AHEAD = EXACT + N * N * 4, R_AHEAD = K_AHEAD + TILE, V_AHEAD = R_AHEAD + TILE,
        BYTES = V_AHEAD + TILE,
        // in tiles that are not needed any more at the end of a chunk
        A_AHEAD = A, W_AHEAD = INVERSE, B_AHEAD = STATE,
    };
};
typedef PersistentMemory Persistent;

struct PersistentForward {
    const Io *r, *w, *k, *v, *a, *b;
    const int* segments;
    const float* initial_state;
    Io* y;
    Op *states, *inverse;
    float* last_state;
    int T, H, M;
};

// The state; a thread of the first group always reads and writes the same numbers of it.
DEVICE FloatFour* exact_state(int slab) {
    return &shared_at<FloatFour>(Persistent::EXACT) + slab * (N / 8) * 32 + thread_index() % 32;
}
DEVICE void load_exact(Slab<>& s, int slab) {
    const FloatFour* here = exact_state(slab);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        FloatFour four = here[j * 32];
#pragma unroll
        for (int i = 0; i < 4; i++) s.x[j][i] = four.x[i];
    }
}
DEVICE void store_exact(const Slab<>& s, int slab) {
    FloatFour* here = exact_state(slab);
#pragma unroll
    for (int j = 0; j < N / 8; j++)
        here[j * 32] = FloatFour{s.x[j][0], s.x[j][1], s.x[j][2], s.x[j][3]};
}

// A thread reads later only what it has fetched itself.
DEVICE void fetch(const PersistentForward& p, int chunk) {
    Position at = position(p.T, p.H, p.M, chunk);
    fetch_tokens(Persistent::W_AHEAD, p.w, at);
    fetch_tokens(Persistent::A_AHEAD, p.a, at);
    fetch_tokens(Persistent::B_AHEAD, p.b, at);
    fetch_tokens(Persistent::K_AHEAD, p.k, at);
    fetch_tokens(Persistent::R_AHEAD, p.r, at);
    fetch_tokens(Persistent::V_AHEAD, p.v, at);
    commit_copies();
}

DEVICE void put_fetched(const PersistentForward& p, const Position& at, Shared& shared) {
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    wait_copies<0>();
    put_tokens(At::V, read_fetched_tokens(Persistent::V_AHEAD));
    Tokens b = read_fetched_tokens(Persistent::B_AHEAD);  // other threads will write the state there
    Factors factor = decay_factors(read_fetched_tokens(Persistent::W_AHEAD), at, shared);
    put_scaled(At::A, read_fetched_tokens(Persistent::A_AHEAD), factor.before, factor.first);
    put_scaled(At::R, read_fetched_tokens(Persistent::R_AHEAD), factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, b, factor.first, factor.second);
    put_scaled(At::K, read_fetched_tokens(Persistent::K_AHEAD), factor.first, factor.second);
}

// Stores the entering state for the backward pass, and as a tile, measured from the chunk's middle.
DEVICE void put_state(const PersistentForward& p, const Position& at, int slab, const Shared& shared) {
    Slab<> s;
    load_exact(s, slab);
    if (p.states) store_right(p.states + at.matrix * N * N, slab, s);
    each(s, [&](float& x, int, int, int c) { x *= shared.middle[c]; });
    store_tile(Persistent::STATE, slab * 16, s);
}

DEVICE void step_state(const Documents& documents, int slab, const Shared& shared) {
    Slab<> s;
    load_exact(s, slab);
    bool is_carried = documents.is_carried();
    each(s, [&](float& x, int, int, int c) { x = is_carried ? x * shared.middle[c] : 0.0f; });
    warpgroup::add_product_transposed(s, At::U, slab * 16, At::B, Range{0, C});
    warpgroup::add_product_transposed(s, At::V, slab * 16, At::K, Range{0, C});
    each(s, [&](float& x, int, int, int c) { x *= shared.end[c]; });
    store_exact(s, slab);
}

// s = left state^T of the tokens that see the entering state, + (left K^T) V
DEVICE void read_state(Slab<>& s, Tile left, int row0, bool with_itself, const Shared& shared) {
    Documents documents = read_documents(shared.documents);
    Bounds earlier = bounds(row0 / 16, documents, false);
    Rows rows = load_rows_of(left, row0);
    warpgroup::set_transposed(s, rows, Persistent::STATE);
    if (documents.is_packed())
        each(s, [&](float& x, int, int row, int) { x = row0 + row < documents.entering ? x : 0.0f; });
    warpgroup::add_pairs(s, rows, Pairs{At::K, At::V, with_itself}, earlier);
}

// The first group of warps computes the inverse, u and the state. The second computes what is read: u
// before it is multiplied by the inverse, and y.
KERNEL(wkv7_persistent_forward, PersistentForward, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    int group = warp_index() / GROUP_WARPS, own_slab = warp_index() % GROUP_WARPS;
    u64 matrix = ((u64)block_y() * N + own_slab * 16) * N;
    Slab<> s;
    if (group == 0) {
        clear(s);
        if (p.initial_state)
            each(s, [&](float& x, int, int row, int c) { x = p.initial_state[matrix + row * N + c]; });
        store_exact(s, own_slab);
    }
    fetch(p, 0);
#pragma unroll 1
    for (int chunk = 0; chunk < p.M; chunk++) {
        Position at = position(p.T, p.H, p.M, chunk);
        // else the compiler would make the addresses of a chunk before the loop, in too many registers
        int slab = computed_here(own_slab), row0 = slab * 16;
        put_fetched(p, at, shared);
        if (group == 0) {
            sync_group(1, GROUP_THREADS);  // the first warp has written `middle`
            put_state(p, at, slab, shared);
        }
        warpgroup::sync_block();

        if (group == 0) {
            Bounds earlier = bounds(slab, read_documents(shared.documents), false);
            Slab<C / 8> pairs;
            warpgroup::set_pairs(pairs, load_rows_of(At::A, row0), At::B, earlier, false);
            invert(pairs, slab);
        } else {
            read_state(s, At::A, row0, false, shared);
            store_tile(At::U, row0, s);
            // compute-sanitizer orders two groups by how many barriers each has passed
            for (int turn = 0; turn <= GROUP_WARPS; turn++) sync_group(2, GROUP_THREADS);
        }
        warpgroup::sync_block();

        if (group == 0) {
            clear(s);
            warpgroup::add_product(s, At::INVERSE, row0, At::U, Range{0, row0 + 16});
            warpgroup::sync_group(1);
            store_tile(At::U, row0, s);
            if (p.inverse) store_inverse(p.inverse, at, slab);
        } else {
            read_state(s, At::R, row0, true, shared);
        }
        warpgroup::sync_block();

        if (chunk + 1 < p.M) fetch(p, chunk + 1);
        Documents documents = read_documents(shared.documents);
        if (group == 1) {
            Bounds earlier = bounds(slab, documents, false);
            warpgroup::add_pairs(s, load_rows_of(At::R, row0), Pairs{At::B, At::U, true}, earlier);
            store_rows(p.y, at, row0, s);
        }
        if (documents.is_packed()) {
            warpgroup::sync_block();
            zero_rows(At::B, 0, documents.leaving);
            zero_rows(At::K, 0, documents.leaving);
            warpgroup::sync_block();
        }
        if (group == 0) step_state(documents, slab, shared);
        warpgroup::sync_block();
    }
    if (group == 0) {
        load_exact(s, own_slab);
        each(s, [&](float& x, int, int row, int c) { p.last_state[matrix + row * N + c] = x; });
    }
}
