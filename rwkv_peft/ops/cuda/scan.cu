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

// A warp holds 16 rows of one state, which evolve alone. What it needs for the chunks ahead is copied
// into `depth` stages of shared memory.
struct Stage {
    Op transition[N * N], added[16 * N];
    float decay[N];
};
static_assert(sizeof(Stage) == (N * N + 16 * N) * sizeof(Op) + N * sizeof(float), "as the host has it");

DEVICE void fetch(Stage& stage, const Scan& p, u64 matrix, int slab) {
    int lane = thread_index() % 32;
    constexpr int COPIES = sizeof(Fragment) / 16;
    if (p.transition)
#pragma unroll
        for (int i = 0; i < SLABS * (N / 16); i++)
#pragma unroll
            for (int j = 0; j < COPIES; j++) {
                int offset = ((i * 32 + lane) * COPIES + j) * (16 / sizeof(Op));
                copy_async(stage.transition + offset, p.transition + matrix * N * N + offset);
            }
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int j = 0; j < COPIES; j++) {
            int offset = ((k * 32 + lane) * COPIES + j) * (16 / sizeof(Op));
            copy_async(stage.added + offset,
                       p.added + matrix * N * N + slab * 16 * N + offset);
        }
    if (lane < N / 4) copy_async(stage.decay + lane * 4, p.decay + matrix * N + lane * 4);
}

DEVICE void wait_for_oldest(int depth) {
    if (depth >= 6) wait_copies<5>();
    else if (depth >= 4) wait_copies<3>();
    else if (depth == 3) wait_copies<2>();
    else wait_copies<1>();
    sync_warp();
}

KERNEL(scan, Scan, 32, 1) {
    Stage* stages = (Stage*)shared_memory;
    int slab = block_x();
    u64 first = (u64)block_y() * p.M;
    auto matrix = [&](int step) { return first + (p.is_reverse ? p.M - 1 - step : step); };

    Slab<> s;
    clear(s);
    if (p.initial)
        each(s, [&](float& x, int, int row, int column) {
            x = p.initial[((u64)block_y() * N + slab * 16 + row) * N + column];
        });
    for (int i = 0; i < p.depth; i++) {
        if (i < p.M) fetch(stages[i], p, matrix(i), slab);
        commit_copies();
    }
    for (int step = 0, at = 0; step < p.M; step++, at = at + 1 < p.depth ? at + 1 : 0) {
        wait_for_oldest(p.depth);
        Stage& stage = stages[at];
        Fragment rows[N / 16];
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
            rows[k] = fragment(s, k);
            if (p.states) store(piece(p.states + matrix(step) * N * N, slab, k), as_right(rows[k]));
            Fragment added;
            load(added, piece((const Op*)stage.added, 0, k));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x[2];
                get_fragment(added, i, x[0], x[1]);
                float* pair = s.x[2 * k + i / 2] + i % 2 * 2;
                int column = k * 16 + i / 2 * 8 + thread_index() % 4 * 2;
                pair[0] = pair[0] * stage.decay[column] + x[0];
                pair[1] = pair[1] * stage.decay[column + 1] + x[1];
            }
        }
        if (p.transition)
#pragma unroll
            for (int k = 0; k < N / 16; k++)
#pragma unroll
                for (int j = 0; j < SLABS; j++) {
                    Fragment right;
                    load(right, piece((const Op*)stage.transition, j, k));
                    mma(s.x[2 * j], rows[k], right, 0);
                    mma(s.x[2 * j + 1], rows[k], right, 1);
                }
        sync_warp();
        if (step + p.depth < p.M) fetch(stage, p, matrix(step + p.depth), slab);
        commit_copies();
    }
    if (p.last)
        each(s, [&](float& x, int, int row, int column) {
            p.last[((u64)block_y() * N + slab * 16 + row) * N + column] = x;
        });
}
