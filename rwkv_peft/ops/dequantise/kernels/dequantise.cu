// The dense numbers of stored weights: packed times scale in float32, rounded once to what IO says.
// A thread makes eight numbers, which it reads and writes at once where they lie aligned.
#include "tile.cuh"

constexpr int THREADS = 256, EACH = 8;

struct __align__(8) Bytes { u32 x[2]; };

#if IO == 2
typedef float Dense;
DEVICE void write(Dense* to, float x) { *to = x; }
#else
typedef u16 Dense;
DEVICE void write(Dense* to, float x) { *to = IO == 0 ? (u16)pack_bf16(x, 0.f) : float_to_half(x); }
#endif

DEVICE void write_all(Dense* to, const float (&x)[EACH]) {
#if IO == 2
    for (int i = 0; i < EACH; i += 2) store_global(to + i, FloatPair{x[i], x[i + 1]});
#else
    Vector v;
#pragma unroll
    for (int i = 0; i < EACH; i += 2)
        v.x[i / 2] = IO == 0 ? pack_bf16(x[i], x[i + 1])
                             : float_to_half(x[i]) | (u32)float_to_half(x[i + 1]) << 16;
    store_global(to, v);
#endif
}

struct StoredRows {
    const signed char* packed;  // (rows, width)
    const float* scale;         // (rows,)
    Dense* dense;               // (rows, width)
    int width;
};

// a block for each row
KERNEL(dequantise_rows, StoredRows, THREADS, 1) {
    u64 row = block_x();
    const signed char* packed = p.packed + row * p.width;
    Dense* dense = p.dense + row * p.width;
    float scale = p.scale[row];
    if (p.width % EACH) {
        for (int i = thread_index(); i < p.width; i += THREADS) write(dense + i, packed[i] * scale);
        return;
    }
    for (int i = thread_index() * EACH; i < p.width; i += THREADS * EACH) {
        Bytes bytes = *(const Bytes*)(packed + i);
        float x[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) x[j] = (signed char)(bytes.x[j / 4] >> 8 * (j % 4)) * scale;
        write_all(dense + i, x);
    }
}

struct StoredBlocks {
    const unsigned char* packed;  // (count / 2,) the first of two codes in the upper half
    const float* scale;           // (count / 64,)
    const float* codes;           // (16,)
    Dense* dense;                 // (count,)
    u64 count;
};

// a thread for eight numbers. The codes lie in banks of their own, so that no look-up waits.
KERNEL(dequantise_blocks, StoredBlocks, THREADS, 1) {
    float* codes = (float*)shared_memory;
    if (thread_index() < 16) codes[thread_index()] = p.codes[thread_index()];
    sync_block();
    u64 first = ((u64)block_x() * THREADS + thread_index()) * EACH;
    if (first >= p.count) return;
    float scale = p.scale[first / 64];
    if (first + EACH > p.count) {
        for (u64 i = first; i < p.count; i++)
            write(p.dense + i, codes[p.packed[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale);
        return;
    }
    u32 bytes = *(const u32*)(p.packed + first / 2);
    float x[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) x[j] = codes[bytes >> 8 * (j / 2) + (j % 2 ? 0 : 4) & 15] * scale;
    write_all(p.dense + first, x);
}
