// The dense numbers of stored weights: packed times scale in float32, rounded once to what IO says.
// A thread makes eight numbers at once, which lie aligned, and some such groups: all are read before
// one is written, so that the memory has enough to do.
#include "tile.cuh"

constexpr int THREADS = 256, EACH = 8, GROUPS = 2;

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

// Calls `make(group)` for the groups of this thread that are among `count`, after `read(group, slot)`.
template <class Read, class Make> DEVICE void for_groups(u64 count, Read read, Make make) {
    u64 first = (u64)block_x() * (THREADS * GROUPS) + thread_index();
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        if (first + i * THREADS < count) read(first + i * THREADS, i);
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        if (first + i * THREADS < count) make(first + i * THREADS, i);
}

struct StoredRows {
    const signed char* packed;  // (rows, width)
    const float* scale;         // (rows,)
    Dense* dense;               // (rows, width)
    u64 count;
    u32 width;
};

KERNEL(dequantise_rows, StoredRows, THREADS, 1) {
    if (p.width % EACH) {
        u64 first = (u64)block_x() * (THREADS * GROUPS * EACH);
        for (int i = thread_index(); i < THREADS * GROUPS * EACH && first + i < p.count; i += THREADS)
            write(p.dense + first + i, p.packed[first + i] * p.scale[(first + i) / p.width]);
        return;
    }
    Bytes bytes[GROUPS];
    float scale[GROUPS];
    u32 row = p.width / EACH;
    for_groups(
        p.count / EACH,
        [&](u64 group, int i) {
            bytes[i] = ((const Bytes*)p.packed)[group];
            scale[i] = p.scale[(u32)group / row];
        },
        [&](u64 group, int i) {
            float x[EACH];
#pragma unroll
            for (int j = 0; j < EACH; j++)
                x[j] = (signed char)(bytes[i].x[j / 4] >> 8 * (j % 4)) * scale[i];
            write_all(p.dense + group * EACH, x);
        });
}

struct StoredBlocks {
    const unsigned char* packed;  // (count / 2,) the first of two codes in the upper half
    const float* scale;           // (count / 64,)
    const float* codes;           // (16,)
    Dense* dense;                 // (count,)
    u64 count;
};

// The codes lie in banks of their own, so that no look-up waits.
KERNEL(dequantise_blocks, StoredBlocks, THREADS, 1) {
    float* codes = (float*)shared_memory;
    if (thread_index() < 16) codes[thread_index()] = p.codes[thread_index()];
    sync_block();
    u32 bytes[GROUPS];
    float scale[GROUPS];
    for_groups(
        p.count / EACH,
        [&](u64 group, int i) {
            bytes[i] = ((const u32*)p.packed)[group];
            scale[i] = p.scale[group * EACH / 64];
        },
        [&](u64 group, int i) {
            float x[EACH];
#pragma unroll
            for (int j = 0; j < EACH; j++)
                x[j] = codes[bytes[i] >> 8 * (j / 2) + (j % 2 ? 0 : 4) & 15] * scale[i];
            write_all(p.dense + group * EACH, x);
        });
    // what is left behind the last group
    if (block_x() || thread_index() >= p.count % EACH) return;
    u64 last = p.count / EACH * EACH + thread_index();
    write(p.dense + last, codes[p.packed[last / 2] >> (last % 2 ? 0 : 4) & 15] * p.scale[last / 64]);
}
