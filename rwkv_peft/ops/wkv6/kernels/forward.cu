// Forward stages of WKV-6 that are parallel over chunks; the formulas are in ../stages.py.
#include "halves.cuh"

struct Chunk {
    const Io *w, *keys, *values;
    const int* segments;
    Op* added;
    float* decay;
    int T, H, M, is_reverse;
};

struct ChunkMemory {
    enum : u32 {
        KEYS = 0, VALUES = tile_bytes(C), SHARED = 2 * tile_bytes(C), BYTES = SHARED + sizeof(Shared),
    };
};

// What a chunk adds to the state, values^T (keys by what the chunk leaves of them), and what is left of
// the state. Reversed, with dy and r, the same of the state's gradient.
KERNEL(wkv6_chunk, Chunk, THREADS, 2) {
    typedef ChunkMemory At;
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    {
        Tokens w = load_tokens(p.w, at), keys = load_tokens(p.keys, at);
        put_tokens(At::VALUES, load_tokens(p.values, at));
        write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
        Factors f = decay_factors(w, at, shared, [](int, bool, const float (&)[TOKENS][8]) {});
        if (p.is_reverse) put_scaled(At::KEYS, keys, f.before[0], f.before[1]);
        else put_scaled(At::KEYS, keys, f.after[0], f.after[1]);
    }
    sync_block();
    Documents documents = read_documents(shared.documents);
    if (documents.is_packed()) {
        if (p.is_reverse) zero_rows(At::KEYS, documents.entering, C);
        else zero_rows(At::KEYS, 0, documents.leaving);
        sync_block();
    }
    if (thread_index() < N) {
        int c = thread_index();
        p.decay[at.matrix * N + c] = documents.is_carried() ? shared.end[c] : 0.0f;
    }
    for (int i = warp_index(); i < SLABS; i += WARPS) {
        Slab<> s;
        clear(s);
        add_product_transposed(s, At::VALUES, i * 16, At::KEYS, Range{0, C});
        store_left(p.added + at.matrix * N * N, i, s);
    }
}

struct Output {
    const Io *r, *w, *k, *v;
    const float* u;
    const int* segments;
    const Op* states;
    Io* y;
    int T, H, M;
};

struct OutputMemory {
    enum : u32 {
        TILE = tile_bytes(C),
        LEVEL = 0,  // a tile a level: late rows r, early rows k, measured from their border
        R = LEVELS * TILE, V = R + TILE,
        PARTS = V + TILE,  // float[32][GROUP_THREADS]
        SHARED = PARTS + 32 * GROUP_THREADS * 4,
        BYTES = SHARED + sizeof(Shared),
    };
};

DEVICE void load_output(const Output& p, const Position& at, Shared& shared) {
    typedef OutputMemory At;
    Tokens w = load_tokens(p.w, at), r = load_tokens(p.r, at), k = load_tokens(p.k, at);
    put_tokens(At::V, load_tokens(p.v, at));
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    float u[8];
#pragma unroll
    for (int c = 0; c < 8; c++) u[c] = p.u[block_y() % p.H * N + own_channel() + c];
    put_dots(shared.own, r, k, u);
    put_tokens(At::LEVEL, Tokens{k.x[0], r.x[1]});
    Factors f = decay_factors(w, at, shared, [&](int level, bool is_late, const float (&x)[TOKENS][8]) {
        Tokens tokens = k;
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
#pragma unroll
            for (int j = 0; j < (int)(sizeof(RawEight) / 16); j++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    tokens.x[i].x[j].x[c] = is_late ? r.x[i].x[j].x[c] : k.x[i].x[j].x[c];
        put_scaled(At::LEVEL + level * At::TILE, tokens, x[0], x[1]);
    });
    put_scaled(At::R, r, f.before[0], f.before[1]);
}

// y of the entering state, for the tokens that see it
DEVICE void add_entering(Slab<>& y, Tile r, int row0, const Op* states, const Documents& d) {
    Rows left = load_rows_of(r, row0);
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int j = 0; j < SLABS; j++) {
            Fragment right;
            load(right, piece(states, j, k));
            mma(y.x[2 * j], left.k[k], right, 0);
            mma(y.x[2 * j + 1], left.k[k], right, 1);
        }
    mask(y, [&](int, int row, int) { return row0 + row < d.entering; });
}

// The first group of warps takes the state and what lies in other slabs, the second the own slab.
KERNEL(wkv6_output, Output, THREADS, 2) {
    typedef OutputMemory At;
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS, row0 = slab * 16;
    load_output(p, at, shared);
    sync_block();
    Documents documents = read_documents(shared.documents);
    Slab<> y;
    clear(y);
    if (group == 0) add_entering(y, At::R, row0, p.states + at.matrix * N * N, documents);
    Bounds b = bounds(slab, documents, false);
#pragma unroll 1
    for (int level = group == 0 ? 4 : 0; level < (group == 0 ? LEVELS : 4); level++) {
        if (!has_partner(b, level, false)) continue;
        Tile tile = At::LEVEL + level * At::TILE;
        Rows left = load_rows_of(tile, row0);
#pragma unroll 1
        for (int block = b.begin; block < b.end; block++) {
            Rows right = load_right_rows(tile, block * 16), values = load_values(At::V, block * 16);
            add_piece(y, level_block(left, right, block, level, b), values);
        }
    }
    float* parts = &shared_at<float>(At::PARTS) + thread_index() % GROUP_THREADS;
    if (group == 1)
        each_pair([&](int j, int i, int row, int column) {
            float x[2], own = shared.own[row0 + row];
            get_pair(At::V, row0 + row, column, x[0], x[1]);
#pragma unroll
            for (int e = 0; e < 2; e++)
                parts[(j * 4 + i * 2 + e) * GROUP_THREADS] = y.x[j][2 * i + e] + own * x[e];
        });
    sync_block();
    if (group == 1) return;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) y.x[j][i] += parts[(j * 4 + i) * GROUP_THREADS];
    store_rows(p.y, at, row0, y);
}
