// What both forms of WKV-7's forward pass share: shared memory of a block, and the inverse of the pair
// products.
#pragma once
#include "decay.cuh"

struct ForwardMemory {
    enum : u32 {
        TILE = tile_bytes(C),
        A = 0, R = TILE, B = 2 * TILE, K = 3 * TILE, V = 4 * TILE, U = 5 * TILE, INVERSE = 6 * TILE,
        SCRATCH = 7 * TILE,  // float[GROUP_WARPS][16][17]
        SHARED = SCRATCH + GROUP_WARPS * 16 * 17 * 4,
        BYTES = SHARED + sizeof(Shared),
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
        shared_at<Op>(At::INVERSE + place(row, row0 + lane % 16)) =
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
