// Gradients of WKV-6, parallel over chunks; the formulas are in ../stages.py.
#include "halves.cuh"

struct Gradients {
    const Io *r, *w, *k, *v, *dy;
    const float* u;
    const int* segments;
    const Op *states, *dstates;
    Io *dr, *dw, *dk, *dv;
    float* du;  // (B, H, M, N)
    int T, H, M;
};

struct GradientMemory {
    enum : u32 {
        TILE = tile_bytes(C), MATRIX = tile_bytes(N),
        R = 0, K = TILE, V = 2 * TILE, DY = 3 * TILE,
        FACTOR = 4 * TILE,  // a tile for each level from 1 on, as in decay_factors
        BEFORE = FACTOR + (LEVELS - 1) * TILE, AFTER = BEFORE + TILE,
        STATE = AFTER + TILE, DSTATE = STATE + MATRIX,
        SUMS = DSTATE + MATRIX,  // float[4][GROUP_WARPS][N], see Kind
        CARRIED = SUMS + 4 * GROUP_WARPS * N * 4,  // float[WARPS / 4][N]
        SHARED = CARRIED + WARPS / 4 * N * 4,
        BYTES = SHARED + sizeof(Shared),
        LOGS = 0,  // float[32][GROUP_THREADS], when the tiles are done with
    };
};
typedef GradientMemory At;
static_assert(32 * GROUP_THREADS * 4 <= At::FACTOR, "logs take the place of tiles");

// Sums over a slab's tokens: of r dr or k dk from the state, from the level of two slabs, and for du.
// The first two are of each group of warps.
enum Kind { FROM_STATE = 0, FROM_LEVEL = 2 };
DEVICE float* sums(int kind, int slab) {
    return &shared_at<float>(At::SUMS) + (kind * GROUP_WARPS + slab) * N;
}

// Entering state and gradient of the leaving one as tiles; their products, summed over value rows,
// are what scales with the whole decay.
DEVICE void put_states(const Gradients& p, const Position& at) {
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    // a warp has pieces of one column
    for (int index = warp; index < 16; index += WARPS) {
        int slab = index / 4, k = index % 4;
        Fragment state, dstate;
        load(state, piece(p.states + at.matrix * N * N, slab, k));
        load(dstate, piece(p.dstates + at.matrix * N * N, slab, k));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = slab * 16 + g + j / 2 * 8, column = k * 16 + j % 2 * 8 + 2 * q;
            float x[2], d[2];
            get_fragment(state, j, x[0], x[1]);
            get_fragment(dstate, j, d[0], d[1]);
            set_pair(At::STATE, row, column, x[0], x[1]);
            set_pair(At::DSTATE, row, column, d[0], d[1]);
            sum[j % 2 * 2] += x[0] * d[0], sum[j % 2 * 2 + 1] += x[1] * d[1];
        }
    }
    float* carried = &shared_at<float>(At::CARRIED) + warp / 4 * N + warp % 4 * 16 + 2 * q;
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum[j] += warp_shuffle(sum[j], lanes);
        if (g == 0) carried[j / 2 * 8 + j % 2] = sum[j];
    }
}

DEVICE void put_factors(Tile tile, const float (&x)[TOKENS][8]) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) set_eight(tile, own_token() + i, own_channel(), x[i]);
}

DEVICE void load_gradients(const Gradients& p, const Position& at, Shared& shared) {
    Tokens w = load_tokens(p.w, at);
    float weight[8];
    {
        Tokens r = load_tokens(p.r, at), k = load_tokens(p.k, at);
#pragma unroll
        for (int c = 0; c < 8; c++) weight[c] = p.u[block_y() % p.H * N + own_channel() + c];
        put_tokens(At::R, r);
        put_tokens(At::K, k);
        put_dots(shared.own, r, k, weight);
    }
    {
        Tokens v = load_tokens(p.v, at), dy = load_tokens(p.dy, at);
#pragma unroll
        for (int c = 0; c < 8; c++) weight[c] = 1.0f;
        put_tokens(At::V, v);
        put_tokens(At::DY, dy);
        put_dots(shared.own_gradient, v, dy, weight);
    }
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    put_states(p, at);
    Factors f = decay_factors(w, at, shared, [](int level, bool, const float (&x)[TOKENS][8]) {
        put_factors(At::FACTOR + (level - 1) * At::TILE, x);
    });
    put_factors(At::BEFORE, f.before);
    put_factors(At::AFTER, f.after);
    for (int i = thread_index(); i < 4 * GROUP_WARPS * N; i += THREADS) sums(0, 0)[i] = 0.0f;
}

DEVICE void multiply(Rows& x, const Rows& y) {
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float a[2], b[2];
            get_fragment(x.k[k], i, a[0], a[1]);
            get_fragment(y.k[k], i, b[0], b[1]);
            set_fragment(x.k[k], i, a[0] * b[0], a[1] * b[1]);
        }
}
DEVICE void multiply(Slab<>& s, Tile tile, int row0) {
    each_pair([&](int j, int i, int row, int column) {
        float x, y;
        get_pair(tile, row0 + row, column, x, y);
        s.x[j][2 * i] *= x, s.x[j][2 * i + 1] *= y;
    });
}

// Zeroes the tokens that do not see the entering state, or are not seen in the leaving one.
DEVICE void mask_tokens(Slab<>& s, int row0, const Documents& d, bool is_later) {
    if (!d.is_packed()) return;
    int begin = is_later ? d.leaving : 0, end = is_later ? C : d.entering;
    mask(s, [&](int, int row, int) { return row0 + row >= begin && row0 + row < end; });
}

DEVICE void value_gradient(const Gradients& p, const Position& at, int slab, const Documents& d,
                           const Shared& shared) {
    int row0 = slab * 16;
    Slab<> s;
    clear(s);
    {
        Rows left = load_rows_of(At::K, row0);
        multiply(left, load_rows_of(At::AFTER, row0));
        add_matrix_transposed(s, left, At::DSTATE);
        mask_tokens(s, row0, d, true);
    }
    Bounds b = bounds(slab, d, true);
#pragma unroll 1
    for (int level = 0; level < LEVELS; level++) {
        if (!has_partner(b, level, true)) continue;
        Tile factor = At::FACTOR + (level - 1) * At::TILE;
        Rows left = load_rows_of(At::K, row0);
        if (level) multiply(left, load_rows_of(factor, row0));
#pragma unroll 1
        for (int block = b.begin; block < b.end; block++) {
            Rows right = load_right_rows(At::R, block * 16);
            if (level) multiply(right, load_right_rows(factor, block * 16));
            add_piece(s, level_block(left, right, block, level, b), At::DY, block * 16);
        }
    }
    each_pair([&](int j, int i, int row, int column) {
        float x, y, own = shared.own[row0 + row];
        get_pair(At::DY, row0 + row, column, x, y);
        s.x[j][2 * i] += own * x, s.x[j][2 * i + 1] += own * y;
    });
    store_rows(p.dv, at, row0, s);
}

// logs += sum of x over what comes after each token in its half of `size` tokens, or before it; `total`,
// if not null, gets the sum over the slab.
DEVICE void add_sums(Slab<>& logs, const Slab<>& x, int size, bool is_before, float* total) {
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float upper = x.x[j][e], lower = x.x[j][2 + e];
#pragma unroll
            for (int bit = 1; bit < 8; bit *= 2) {
                if (bit >= size) continue;
                bool takes = ((g & bit) != 0) == is_before;
                float a = warp_shuffle(upper, 4 * bit), b = warp_shuffle(lower, 4 * bit);
                logs.x[j][e] += takes ? a : 0.0f, logs.x[j][2 + e] += takes ? b : 0.0f;
                upper += a, lower += b;
            }
            if (size < 16) continue;
            if (is_before) logs.x[j][2 + e] += upper;
            else logs.x[j][e] += lower;
            if (total && g == 0) total[j * 8 + 2 * q + e] = upper + lower;
        }
}

// Gradient of r (first group of warps) or of k, and what it gives to those of the log decays: of dr,
// the decays before a token have a part, of dk those after it. A product passes only the decays within
// its half, and is summed within it, so that nothing has to cancel.
DEVICE void key_gradient(Slab<>& d, Slab<>& logs, int group, int slab, const Documents& documents) {
    bool is_first = group == 0;
    Tile left_tile = is_first ? At::DY : At::V, right_tile = is_first ? At::V : At::DY;
    Tile own = is_first ? At::R : At::K, other = is_first ? At::K : At::R;
    int row0 = slab * 16;
    Bounds b = bounds(slab, documents, !is_first);
    Rows left = load_rows_of(left_tile, row0);
    clear(d);
    clear(logs);
#pragma unroll 1
    for (int level = LEVELS; level >= 0; level--) {
        Slab<> s;
        clear(s);
        Tile factor = At::FACTOR + (level - 1) * At::TILE;
        float* total = nullptr;
        if (level == LEVELS) {
            factor = is_first ? At::BEFORE : At::AFTER;
            add_matrix(s, left, is_first ? At::STATE : At::DSTATE);
            mask_tokens(s, row0, documents, !is_first);
            total = sums(FROM_STATE + group, slab);
        } else {
            if (!has_partner(b, level, !is_first)) continue;
#pragma unroll 1
            for (int block = b.begin; block < b.end; block++) {
                Rows right = load_right_rows(right_tile, block * 16);
                Fragment a = level_block(left, right, block, level, b);
                Rows values = load_values(other, block * 16);
                if (level) multiply(values, load_values(factor, block * 16));
                add_piece(s, a, values);
            }
            if (level == 5) total = sums(FROM_LEVEL + group, slab);
        }
        if (level) multiply(s, factor, row0);
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) d.x[j][i] += s.x[j][i];
        if (level == 0) continue;
        multiply(s, own, row0);
        add_sums(logs, s, 1 << level, !is_first, total);
    }
}

// Adds what a token's own product gives to dr or dk.
DEVICE void add_own(Slab<>& d, const float* u, int row0, Tile other, const Shared& shared) {
    each_pair([&](int j, int i, int row, int column) {
        float x, y, gradient = shared.own_gradient[row0 + row];
        get_pair(other, row0 + row, column, x, y);
        d.x[j][2 * i] += gradient * u[column] * x;
        d.x[j][2 * i + 1] += gradient * u[column + 1] * y;
    });
}

// What the other slabs give to the gradient of a log decay of this one.
DEVICE float other_slabs(int slab, int c, const Documents& documents, const Shared& shared) {
    float sum = 0.0f;
    for (int other = 0; other < GROUP_WARPS; other++) {
        if (other > slab) sum += sums(FROM_STATE, other)[c];
        if (other < slab) sum += sums(FROM_STATE + 1, other)[c];
    }
    // halves of two slabs: the late one's first slab has the second after it, and the other way round
    if (slab == 1) sum += sums(FROM_LEVEL + 1, 0)[c];
    if (slab == 2) sum += sums(FROM_LEVEL, 3)[c];
    if (!documents.is_carried()) return sum;
    float carried = 0.0f;
    for (int i = 0; i < WARPS / 4; i++) carried += (&shared_at<float>(At::CARRIED))[i * N + c];
    return sum + carried * shared.end[c];
}

KERNEL(wkv6_gradients, Gradients, THREADS, 1) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    Position at = position(p.T, p.H, p.M, block_x());
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS, row0 = slab * 16;
    load_gradients(p, at, shared);
    sync_block();
    Documents documents = read_documents(shared.documents);
    // dv is shared: each group has the slabs that meet few others in key_gradient
    if ((group == 0) == (slab < GROUP_WARPS / 2)) value_gradient(p, at, slab, documents, shared);

    Slab<> d, logs;
    key_gradient(d, logs, group, slab, documents);
    const float* u = p.u + block_y() % p.H * N;
    add_own(d, u, row0, group == 0 ? At::K : At::R, shared);
    store_rows(group == 0 ? p.dr : p.dk, at, row0, d);
    if (thread_index() < N) {
        float sum = 0.0f;
        int c = thread_index();
        for (int t = 0; t < C; t++) {
            float r[2], k[2];
            get_pair(At::R, t, c & ~1, r[0], r[1]);
            get_pair(At::K, t, c & ~1, k[0], k[1]);
            sum += shared.own_gradient[t] * (c & 1 ? r[1] * k[1] : r[0] * k[0]);
        }
        p.du[at.matrix * N + c] = sum;
    }
    sync_block();
    float* parts = &shared_at<float>(At::LOGS) + thread_index() % GROUP_THREADS;
    if (group == 1)
#pragma unroll
        for (int i = 0; i < 32; i++) parts[i * GROUP_THREADS] = logs.x[i / 4][i % 4];
    // this group's vector of what other slabs give, in the place of the last row of factors
    float* others = &shared_at<float>(At::STATE);
    for (int i = thread_index(); i < GROUP_WARPS * N; i += THREADS)
        others[i] = other_slabs(i / N, i % N, documents, shared);
    sync_block();
    if (group == 1) return;
    load_rows(d, p.w, at, row0);
    each(d, [&](float& x, int, int, int) { x = -rate(x); });
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = j * 8 + thread_index() % 4 * 2 + i % 2;
            float sum = logs.x[j][i] + parts[(j * 4 + i) * GROUP_THREADS] + others[slab * N + column];
            d.x[j][i] *= sum;
        }
    store_rows(p.dw, at, row0, d);
}
