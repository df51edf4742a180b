// The dense numbers of stored weights: packed times scale in float32, rounded once to what IO says.
// A thread makes eight numbers at once, which lie aligned, and some such groups: all are read before
// one is written, so that the memory has enough to do.
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

// Calls `make(group)` for the groups of this thread that are among `count`, after `read(group, slot)`
// of all of them; `meanwhile()` is what the block does while those come.
template <int GROUPS, class Read, class Meanwhile, class Make>
DEVICE void for_groups(u64 count, Read read, Meanwhile meanwhile, Make make) {
    u64 first = (u64)block_x() * (THREADS * GROUPS) + thread_index();
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        if (first + i * THREADS < count) read(first + i * THREADS, i);
    meanwhile();
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
    constexpr int GROUPS = 2;
    if (p.width % EACH) {
        u64 first = (u64)block_x() * (THREADS * GROUPS * EACH);
        for (int i = thread_index(); i < THREADS * GROUPS * EACH && first + i < p.count; i += THREADS)
            write(p.dense + first + i, p.packed[first + i] * p.scale[(first + i) / p.width]);
        return;
    }
    Bytes bytes[GROUPS];
    float scale[GROUPS];
    u32 row = p.width / EACH;
    for_groups<GROUPS>(
        p.count / EACH,
        [&](u64 group, int i) {
            bytes[i] = ((const Bytes*)p.packed)[group];
            scale[i] = p.scale[(u32)group / row];
        },
        [] {},
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

// A scale, in two steps: what is read of it, and what it is once the tables lie in shared memory.
struct Scale {
    float x;
    DEVICE void read(const float* scale, u64 block) { x = scale[block]; }
    DEVICE float get(const float*) const { return x; }
};

struct StoredNested {
    const unsigned char* packed;  // as of `StoredBlocks`
    const unsigned char* scale;   // (count / 64 / 256, 264) places, then the largest and the mean
    const float* codes;           // (16,)
    const float* shares;          // (256,)
    Dense* dense;
    u64 count;
};

struct NestedScale {
    u32 place;
    FloatPair ends;
    DEVICE void read(const unsigned char* scale, u64 block) {
        const unsigned char* group = scale + block / 256 * 264;
        place = group[block % 256];
        ends = *(const FloatPair*)(group + 256);
    }
    DEVICE float get(const float* shares) const {
        return multiply_then_add(shares[place], ends.x, ends.y);
    }
};

// `Part` is a block's scale, `fetch` brings its table. The codes lie in banks of their own, so that no
// look-up waits.
template <int GROUPS, class Part, class Stored, class Fetch>
DEVICE void make_blocks(const Stored& p, Fetch fetch) {
    float *codes = (float*)shared_memory, *shares = codes + 16;
    u32 bytes[GROUPS];
    Part scale[GROUPS];
    for_groups<GROUPS>(
        p.count / EACH,
        [&](u64 group, int i) {
            bytes[i] = ((const u32*)p.packed)[group];
            scale[i].read(p.scale, group * EACH / 64);
        },
        [&] {
            if (thread_index() < 16) codes[thread_index()] = p.codes[thread_index()];
            fetch(shares);
            sync_block();
        },
        [&](u64 group, int i) {
            float x[EACH], factor = scale[i].get(shares);
#pragma unroll
            for (int j = 0; j < EACH; j++)
                x[j] = codes[bytes[i] >> 8 * (j / 2) + (j % 2 ? 0 : 4) & 15] * factor;
            write_all(p.dense + group * EACH, x);
        });
    // what is left behind the last group
    if (block_x() || thread_index() >= p.count % EACH) return;
    u64 last = p.count / EACH * EACH + thread_index();
    scale[0].read(p.scale, last / 64);
    float code = codes[p.packed[last / 2] >> (last % 2 ? 0 : 4) & 15];
    write(p.dense + last, code * scale[0].get(shares));
}

KERNEL(dequantise_blocks, StoredBlocks, THREADS, 1) {
    make_blocks<2, Scale>(p, [](float*) {});
}

// Twice as many groups, as a table of 256 is to be fetched.
KERNEL(dequantise_nested, StoredNested, THREADS, 1) {
    make_blocks<4, NestedScale>(
        p, [&](float* shares) { shares[thread_index()] = p.shares[thread_index()]; });
}
