// Runs a kernel of ops/ on a CPU: every thread of a block is a fiber, and what a warp or a block does
// together happens when the last of them arrives. For tests of what kernels compute; it knows nothing
// of races or of speed.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
#define EMULATED
#define DEVICE inline
#define __align__(n) alignas(n)

namespace emulation {
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    int index;
    bool is_done;
};
struct Warp {
    int arrived = 0;
    u64 generation = 0;
    const void* in[32];
    void* out[32];
};
struct Barrier {
    int arrived = 0;
    u64 generation = 0;
};
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier barriers[16];
inline ucontext_t scheduler;
inline Thread* current;
inline void (*body)();
inline int block[2];
inline u64 progress;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void entry() {
    body();
    current->is_done = true;
    progress++;
    swapcontext(&current->context, &scheduler);
}

inline void run_block(int size) {
    threads.resize(size);
    warps.assign(size / 32, Warp());
    for (auto& barrier : barriers) barrier = Barrier();
    for (int i = 0; i < size; i++) {
        Thread& t = threads[i];
        t.stack.resize(256 << 10);
        t.index = i;
        t.is_done = false;
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link = nullptr;
        makecontext(&t.context, entry, 0);
    }
    for (int left = size; left;) {
        u64 before = progress;
        left = 0;
        for (Thread& t : threads)
            if (!t.is_done) {
                current = &t;
                swapcontext(&scheduler, &t.context);
                left += !t.is_done;
            }
        if (left && progress == before) {
            fprintf(stderr, "emulation: a deadlock\n");
            abort();
        }
    }
}

inline void wait(int id, int count) {
    Barrier& b = barriers[id];
    u64 generation = b.generation;
    progress++;
    if (++b.arrived == count) {
        b.arrived = 0;
        b.generation++;
    }
    while (b.generation == generation) yield();
}

// All lanes give a value and a place for the result; the last one computes for all.
template <class F> void together(const void* in, void* out, F f) {
    Warp& w = warps[current->index / 32];
    int lane = current->index % 32;
    u64 generation = w.generation;
    w.in[lane] = in;
    w.out[lane] = out;
    progress++;
    if (++w.arrived == 32) {
        f(w);
        w.arrived = 0;
        w.generation++;
    }
    while (w.generation == generation) yield();
}
}  // namespace emulation

inline std::vector<unsigned char> shared_storage(1 << 20);
inline unsigned char* shared_memory = (unsigned char*)(((uintptr_t)shared_storage.data() + 127) & ~127ull);

// Memory that nobody wrote is NaN.
#define KERNEL(name, Args, threads, blocks)                                                       \
    static void name##_body(const Args& p);                                                       \
    static const Args* name##_args;                                                               \
    extern "C" void name(const void* args, int x, int y, int size) {                              \
        Args copy;                                                                                \
        memcpy(&copy, args, sizeof copy);                                                         \
        name##_args = &copy;                                                                      \
        emulation::body = [] { name##_body(*name##_args); };                                      \
        for (int j = 0; j < y; j++)                                                               \
            for (int i = 0; i < x; i++) {                                                         \
                emulation::block[0] = i, emulation::block[1] = j;                                 \
                memset(shared_memory, 0xff, (1 << 20) - 256);                                     \
                emulation::run_block(size);                                                       \
            }                                                                                     \
    }                                                                                             \
    static void name##_body(const Args& p)

DEVICE int thread_index() { return emulation::current->index; }
DEVICE int block_x() { return emulation::block[0]; }
DEVICE int block_y() { return emulation::block[1]; }
DEVICE void sync_block() { emulation::wait(0, (int)emulation::threads.size()); }
DEVICE void sync_group(int id, int threads) { emulation::wait(id, threads); }
DEVICE float as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
DEVICE u32 as_bits(float x) { u32 y; memcpy(&y, &x, 4); return y; }

template <class T, class F> T exchange(T x, F f) {
    T out;
    emulation::together(&x, &out, [&](emulation::Warp& w) {
        T in[32], results[32];
        for (int i = 0; i < 32; i++) in[i] = *(const T*)w.in[i];
        for (int i = 0; i < 32; i++) results[i] = f(in, i);
        for (int i = 0; i < 32; i++) *(T*)w.out[i] = results[i];
    });
    return out;
}
DEVICE void sync_warp() { exchange(0, [](const int*, int) { return 0; }); }
DEVICE int warp_index() {
    sync_warp();  // a lane that does not come is a deadlock here, and an illegal instruction there
    return emulation::current->index / 32;
}
DEVICE u32 warp_ballot(bool x) {
    return exchange((u32)x, [](const u32* in, int) {
        u32 bits = 0;
        for (int i = 0; i < 32; i++) bits |= in[i] << i;
        return bits;
    });
}
DEVICE u32 warp_shuffle(u32 x, int mask) {
    return exchange(x, [=](const u32* in, int i) { return in[i ^ mask]; });
}
DEVICE float warp_shuffle(float x, int mask) {
    return exchange(x, [=](const float* in, int i) { return in[i ^ mask]; });
}
DEVICE float shuffle_up(float x, int n) {
    return exchange(x, [=](const float* in, int i) { return in[i < n ? i : i - n]; });
}
DEVICE float shuffle_down(float x, int n) {
    return exchange(x, [=](const float* in, int i) { return in[i + n < 32 ? i + n : i]; });
}
template <class T> DEVICE void store_global(void* p, const T& v) { *(T*)p = v; }
DEVICE int computed_here(int x) { return x; }
DEVICE int leading_zeros(u64 x) { return x ? __builtin_clzll(x) : 64; }
DEVICE int first_set(u64 x) { return x ? __builtin_ctzll(x) + 1 : 0; }
DEVICE float power_of_two(float x) { return std::exp2f(x); }
DEVICE float inverse_of(float x) { return 1.0f / x; }
DEVICE float multiply_then_add(float x, float y, float z) {
    volatile float product = x * y;
    return product + z;
}
DEVICE u32 bf16_bits(float x) {
    u32 bits = as_bits(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
DEVICE float half_to_float(u16 x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
DEVICE u16 float_to_half(float x) { _Float16 y = (_Float16)x; u16 z; memcpy(&z, &y, 2); return z; }
DEVICE u32 to_tf32(float x) { return (as_bits(x) + 0x1000) & 0xffffe000u; }

DEVICE u32 shared_base() { return 0; }
struct MatrixRows { const u16* row; };
struct Registers { u32 x[4]; };
template <bool TRANSPOSED> void emulate_load(u32 (&x)[4], u32 row) {
    MatrixRows in{(const u16*)(shared_memory + row)};
    Registers out;
    emulation::together(&in, &out, [](emulation::Warp& w) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                u32 bits = 0;
                for (int k = 0; k < 2; k++) {
                    int r = lane / 4, c = lane % 4 * 2 + k;
                    if (TRANSPOSED) std::swap(r, c);
                    bits |= (u32)((const MatrixRows*)w.in[i * 8 + r])->row[c] << 16 * k;
                }
                ((Registers*)w.out[lane])->x[i] = bits;
            }
    });
    memcpy(x, out.x, sizeof x);
}
DEVICE void load_matrices(u32 (&x)[4], u32 row) { emulate_load<false>(x, row); }
DEVICE void load_matrices_transposed(u32 (&x)[4], u32 row) { emulate_load<true>(x, row); }

struct Operands { u32 a[4], b[2]; float c[4]; };
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Operands in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    emulation::together(&in, c, [](emulation::Warp& w) {
        float left[16][16], right[16][8];
        auto lower = [](u32 x) { return as_float(x << 16); };
        auto upper = [](u32 x) { return as_float(x & 0xffff0000u); };
        for (int lane = 0; lane < 32; lane++) {
            const Operands& o = *(const Operands*)w.in[lane];
            int g = lane / 4, q = lane % 4;
            for (int i = 0; i < 4; i++) {
                left[g + i % 2 * 8][2 * q + i / 2 * 8] = lower(o.a[i]);
                left[g + i % 2 * 8][2 * q + 1 + i / 2 * 8] = upper(o.a[i]);
            }
            for (int i = 0; i < 2; i++) {
                right[2 * q + 8 * i][g] = lower(o.b[i]);
                right[2 * q + 1 + 8 * i][g] = upper(o.b[i]);
            }
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = ((const Operands*)w.in[lane])->c[i];
                for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
                ((float*)w.out[lane])[i] = sum;
            }
    });
}
DEVICE void mma_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Operands in{{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    emulation::together(&in, c, [](emulation::Warp& w) {
        float left[16][8], right[8][8];
        for (int lane = 0; lane < 32; lane++) {
            const Operands& o = *(const Operands*)w.in[lane];
            int g = lane / 4, q = lane % 4;
            for (int i = 0; i < 4; i++) left[g + i % 2 * 8][q + i / 2 * 4] = as_float(o.a[i]);
            for (int i = 0; i < 2; i++) right[q + 4 * i][g] = as_float(o.b[i]);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = ((const Operands*)w.in[lane])->c[i];
                for (int k = 0; k < 8; k++) sum += left[row][k] * right[k][column];
                ((float*)w.out[lane])[i] = sum;
            }
    });
}
DEVICE void copy_async(void* shared, const void* global, bool is_there = true) {
    if (is_there) memcpy(shared, global, 16);
    else memset(shared, 0, 16);
}
DEVICE void commit_copies() {}
template <int PENDING> void wait_copies() {}
