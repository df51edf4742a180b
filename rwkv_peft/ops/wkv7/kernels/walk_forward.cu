// WKV-7's forward pass in one launch: a block goes through the chunks of a head, with the state in
// float32 beside it, and fetches a chunk while it ends the one before. Nothing is written but results
// and what the backward pass needs; for as many heads as fill the GPU.
#include "forward.cuh"

static_assert(IO == 0 && C == 64, "a warp has one slab of the state; other builds walk no faster");

struct WalkMemory : ForwardMemory {
    enum : u32 {
        STATE = (ForwardMemory::BYTES + 1023) / 1024 * 1024,
        EXACT = STATE + tile_bytes(N),  // float[N][N], as the threads of the first group have it
        K_AHEAD = EXACT + N * N * 4, R_AHEAD = K_AHEAD + TILE, V_AHEAD = R_AHEAD + TILE,
        BYTES = V_AHEAD + TILE,
        // in tiles that the end of a chunk needs no more
        A_AHEAD = A, W_AHEAD = INVERSE, B_AHEAD = STATE,
    };
};
typedef WalkMemory Walk;

struct WalkForward {
    const Io *r, *w, *k, *v, *a, *b;
    const int* segments;
    const float* initial_state;
    Io* y;
    Op *states, *inverse;
    float* last_state;
    int T, H, M;
};

// The state, of which a thread of the first group always has the same numbers
DEVICE FloatFour* exact_state(int slab) {
    return &shared_at<FloatFour>(Walk::EXACT) + slab * (N / 8) * 32 + thread_index() % 32;
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

// Each thread finds later what it has fetched itself.
DEVICE void fetch(const WalkForward& p, int chunk) {
    Position at = position(p.T, p.H, p.M, chunk);
    fetch_tokens(Walk::W_AHEAD, p.w, at);
    fetch_tokens(Walk::A_AHEAD, p.a, at);
    fetch_tokens(Walk::B_AHEAD, p.b, at);
    fetch_tokens(Walk::K_AHEAD, p.k, at);
    fetch_tokens(Walk::R_AHEAD, p.r, at);
    fetch_tokens(Walk::V_AHEAD, p.v, at);
    commit_copies();
}

DEVICE void put_fetched(const WalkForward& p, const Position& at, Shared& shared) {
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    wait_copies<0>();
    put_tokens(At::V, fetched_tokens(Walk::V_AHEAD));
    Tokens b = fetched_tokens(Walk::B_AHEAD);  // before others write the state there
    Factors factor = decay_factors(fetched_tokens(Walk::W_AHEAD), at, shared);
    put_scaled(At::A, fetched_tokens(Walk::A_AHEAD), factor.before, factor.first);
    put_scaled(At::R, fetched_tokens(Walk::R_AHEAD), factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, b, factor.first, factor.second);
    put_scaled(At::K, fetched_tokens(Walk::K_AHEAD), factor.first, factor.second);
}

// The entering state for the backward pass, and as a tile, measured from the chunk's middle.
DEVICE void put_state(const WalkForward& p, const Position& at, int slab, const Shared& shared) {
    Slab<> s;
    load_exact(s, slab);
    if (p.states) store_right(p.states + at.matrix * N * N, slab, s);
    each(s, [&](float& x, int, int, int c) { x *= shared.middle[c]; });
    store_tile(Walk::STATE, slab * 16, s);
}

DEVICE void step_state(const Documents& documents, int slab, const Shared& shared) {
    Slab<> s;
    load_exact(s, slab);
    bool is_carried = documents.is_carried();
    each(s, [&](float& x, int, int, int c) { x = is_carried ? x * shared.middle[c] : 0.0f; });
    together::add_product_transposed(s, At::U, slab * 16, At::B, Range{0, C});
    together::add_product_transposed(s, At::V, slab * 16, At::K, Range{0, C});
    each(s, [&](float& x, int, int, int c) { x *= shared.end[c]; });
    store_exact(s, slab);
}

// s = left state^T of the tokens that see the entering state, + (left K^T) V
DEVICE void read_state(Slab<>& s, Tile left, int row0, bool with_itself, const Shared& shared) {
    Documents documents = read_documents(shared.documents);
    Bounds earlier = bounds(row0 / 16, documents, false);
    Rows rows = load_rows_of(left, row0);
    together::set_transposed(s, rows, Walk::STATE);
    if (documents.is_packed())
        each(s, [&](float& x, int, int row, int) { x = row0 + row < documents.entering ? x : 0.0f; });
    together::add_pairs(s, rows, Pairs{At::K, At::V, with_itself}, earlier);
}

// The first group of warps has the inverse, u and the state, the second what is read: u without its
// inverse, and y.
KERNEL(wkv7_walk_forward, WalkForward, THREADS, 2) {
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
        // addresses of a whole chunk, made before the loop, would not fit the registers
        int slab = computed_here(own_slab), row0 = slab * 16;
        put_fetched(p, at, shared);
        if (group == 0) {
            sync_group(1, GROUP_THREADS);  // for middle, which the first warp writes
            put_state(p, at, slab, shared);
        }
        together::sync_block();

        if (group == 0) {
            Bounds earlier = bounds(slab, read_documents(shared.documents), false);
            Slab<C / 8> pairs;
            together::set_pairs(pairs, load_rows_of(At::A, row0), At::B, earlier, false);
            invert(pairs, slab);
        } else {
            read_state(s, At::A, row0, false, shared);
            store_tile(At::U, row0, s);
            // compute-sanitizer orders two groups by how many barriers each has passed
            for (int turn = 0; turn <= GROUP_WARPS; turn++) sync_group(2, GROUP_THREADS);
        }
        together::sync_block();

        if (group == 0) {
            clear(s);
            together::add_product(s, At::INVERSE, row0, At::U, Range{0, row0 + 16});
            together::sync_group(1);
            store_tile(At::U, row0, s);
            if (p.inverse) store_inverse(p.inverse, at, slab);
        } else {
            read_state(s, At::R, row0, true, shared);
        }
        together::sync_block();

        if (chunk + 1 < p.M) fetch(p, chunk + 1);
        Documents documents = read_documents(shared.documents);
        if (group == 1) {
            Bounds earlier = bounds(slab, documents, false);
            together::add_pairs(s, load_rows_of(At::R, row0), Pairs{At::B, At::U, true}, earlier);
            store_rows(p.y, at, row0, s);
        }
        if (documents.is_packed()) {
            together::sync_block();
            zero_rows(At::B, 0, documents.leaving);
            zero_rows(At::K, 0, documents.leaving);
            together::sync_block();
        }
        if (group == 0) step_state(documents, slab, shared);
        together::sync_block();
    }
    if (group == 0) {
        load_exact(s, own_slab);
        each(s, [&](float& x, int, int row, int c) { p.last_state[matrix + row * N + c] = x; });
    }
}
