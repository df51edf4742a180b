// The pass of a recurrence over its chunks: S <- S diag(decay) + S X + added, with S in float32.
#include "tile.cuh"

struct Scan {
    const Op *transition;  // (B, H, M, N, N) X^T as fragments, or null: no S X
    const Op *added;       // (B, H, M, N, N) fragments
    const float *decay;    // (B, H, M, N)
    const float *initial;  // (B, H, N, N), or null: zeros
    Op *states;            // (B, H, M, N, N) fragments of the S that meets each chunk, or null;
                           // may be where `added` is: a warp has read its part of a chunk before
    float *last;           // (B, H, N, N), or null
    int M, is_reverse, depth;
};

// A block holds 16 rows of one state, which evolve alone, and a warp of it 16 columns of them. What a
// warp needs for the chunks ahead it copies into `depth` stages of shared memory; the rows as operands
// go from warp to warp, twice in turn, so that one barrier a chunk is enough.
constexpr int COLUMN_WARPS = N / 16;
struct Stage {
    Op transition[N * N], added[16 * N];
    float decay[N];
};
static_assert(sizeof(Stage) == (N * N + 16 * N) * sizeof(Op) + N * sizeof(float), "as the host has it");
struct Exchange { Fragment k[COLUMN_WARPS][32]; };

// `count` numbers of a chunk to their place in a stage, by one warp
template <class T> DEVICE void copy(T* to, const T* from, int count) {
    for (int i = thread_index() % 32 * (16 / sizeof(T)); i < count; i += 32 * (16 / sizeof(T)))
        copy_async(to + i, from + i);
}
DEVICE void fetch(Stage& stage, const Scan& p, u64 matrix, int slab, int columns) {
    constexpr int PIECE = 16 * 16;
    int transition = columns * (N / 16) * PIECE, added = columns * PIECE;
    if (p.transition)
        copy(stage.transition + transition, p.transition + matrix * N * N + transition, N / 16 * PIECE);
    copy(stage.added + added, p.added + matrix * N * N + slab * 16 * N + added, PIECE);
    copy(stage.decay + columns * 16, p.decay + matrix * N + columns * 16, 16);
}

DEVICE void wait_for_oldest(int depth) {
    if (depth >= 6) wait_copies<5>();
    else if (depth >= 4) wait_copies<3>();
    else if (depth == 3) wait_copies<2>();
    else wait_copies<1>();
    sync_warp();
}

KERNEL(scan, Scan, 32 * COLUMN_WARPS, 1) {
    Exchange* exchange = (Exchange*)shared_memory;
    Stage* stages = (Stage*)(exchange + 2);
    int slab = block_x(), columns = warp_index(), lane = thread_index() % 32;
    u64 first = (u64)block_y() * p.M;
    auto matrix = [&](int step) { return first + (p.is_reverse ? p.M - 1 - step : step); };
    auto place = [&](int row, int column) {
        return ((u64)block_y() * N + slab * 16 + row) * N + columns * 16 + column;
    };

    Slab<2> s;
    clear(s);
    if (p.initial)
        each(s, [&](float& x, int, int row, int column) { x = p.initial[place(row, column)]; });
    for (int i = 0; i < p.depth; i++) {
        if (i < p.M) fetch(stages[i], p, matrix(i), slab, columns);
        commit_copies();
    }
    for (int step = 0, at = 0; step < p.M; step++, at = at + 1 < p.depth ? at + 1 : 0) {
        Stage& stage = stages[at];
        Exchange& rows = exchange[step % 2];
        Fragment own = fragment(s, 0), added;
        wait_for_oldest(p.depth);
        if (p.states) store(piece(p.states + matrix(step) * N * N, slab, columns), as_right(own));
        load(added, piece((const Op*)stage.added, 0, columns));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x[2], *pair = s.x[i / 2] + i % 2 * 2;
            get_fragment(added, i, x[0], x[1]);
            const float* decay = stage.decay + columns * 16 + i / 2 * 8 + lane % 4 * 2;
            pair[0] = pair[0] * decay[0] + x[0], pair[1] = pair[1] * decay[1] + x[1];
        }
        if (p.transition) {
            rows.k[columns][lane] = own;
            sync_block();
#pragma unroll
            for (int k = 0; k < N / 16; k++) {
                Fragment right;
                load(right, piece((const Op*)stage.transition, columns, k));
                mma(s.x[0], rows.k[k][lane], right, 0);
                mma(s.x[1], rows.k[k][lane], right, 1);
            }
        }
        sync_warp();
        if (step + p.depth < p.M) fetch(stage, p, matrix(step + p.depth), slab, columns);
        commit_copies();
    }
    if (p.last) each(s, [&](float& x, int, int row, int column) { p.last[place(row, column)] = x; });
}
