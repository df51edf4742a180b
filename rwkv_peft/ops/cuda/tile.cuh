// What the kernels are built of: dtypes, tiles in shared memory, fragments, products.
//
// One warp computes a slab of 16 rows of a product. The matrix units hold a 16x16 piece of an operand
// and a 16x8 piece of a result spread over the lanes of a warp; with g = lane / 4 and q = lane % 4 a
// lane has the elements
//     result  (16x8):  (g, 2q) (g, 2q+1) (g+8, 2q) (g+8, 2q+1)
//     left   (16x16):  the same of columns 0-7, then of columns 8-15
//     right   (16x8):  (2q, g) (2q+1, g) (2q+8, g) (2q+9, g)
// so that a result is a left operand as it is, and a right operand of its transpose. Two right operands
// side by side, sixteen rows of their transpose, fill a fragment like a left one, but row by row:
// left fragments hold the pairs (g, 2q) (g+8, 2q) (g, 2q+8) (g+8, 2q+8), right ones the second and
// third the other way round, which gives each its registers in a line. Operands are
// bfloat16, TF32, or float32 as sums of three TF32 numbers.
//
// Compile with -DIO=0 (bfloat16), 1 (float16) or 2 (float32) for what the tensors hold, and -DC= for
// the tokens of a chunk. float16 is computed in TF32: its range is too short for the decays.
#pragma once

#ifndef EMULATED
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#endif

constexpr int N = 64;             // head size
constexpr int SLABS = N / 16;     // slabs of 16 channels
constexpr float LOG2E = 1.4426950408889634f;

struct __align__(16) Vector { u32 x[4]; };
struct __align__(16) FloatFour { float x[4]; };
struct __align__(8) FloatPair { float x, y; };

// ------------------------------------------------------------------------------------------------
// instructions
#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL(name, Args, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Args p)
extern __shared__ __align__(1024) unsigned char shared_memory[];

DEVICE int thread_index() {
    int i = threadIdx.x;
    __builtin_assume(i >= 0);  // dividing is shifting then
    return i;
}
// shuffled, so that the compiler knows that all lanes of a warp have the same number
DEVICE int warp_index() {
    int i = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    __builtin_assume(i >= 0);
    return i;
}
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_group(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE u32 warp_ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE u32 warp_shuffle(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float warp_shuffle(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle_up(float x, int lanes) { return __shfl_up_sync(0xffffffffu, x, lanes); }
DEVICE float shuffle_down(float x, int lanes) { return __shfl_down_sync(0xffffffffu, x, lanes); }
DEVICE int leading_zeros(u64 x) { return __clzll(x); }
DEVICE int first_set(u64 x) { return __ffsll(x); }
DEVICE float as_float(u32 x) { return __uint_as_float(x); }
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float inverse_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// x y + z, rounded twice: the compiler would do both at once
DEVICE float multiply_then_add(float x, float y, float z) { return __fadd_rn(__fmul_rn(x, y), z); }
DEVICE u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
DEVICE u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// x; the compiler cannot move what is computed from it ahead of this place
DEVICE int computed_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// In one instruction; the compiler would write a struct number by number.
DEVICE void store_global(void* p, const Vector& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3]) : "memory");
}
DEVICE void store_global(void* p, const FloatPair& v) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x),
                 "f"(v.y) : "memory");
}
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE u32 shared_base() { return shared_address(shared_memory); }
// `row`: address in shared memory of the row that this lane points to
DEVICE void load_matrices(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row));
}
DEVICE void load_matrices_transposed(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row));
}
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
// 16 bytes, or as many zeros
DEVICE void copy_async(void* shared, const void* global, bool is_there = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(is_there ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

// ------------------------------------------------------------------------------------------------
// numbers in global memory
#if IO == 0
typedef u16 Io;
typedef u16 Op;  // operands and intermediate matrices
typedef u32 RawPair;
DEVICE void unpack(RawPair raw, float& x, float& y) {
    x = as_float(raw << 16), y = as_float(raw & 0xffff0000u);
}
DEVICE RawPair pack(float x, float y) { return pack_bf16(x, y); }
DEVICE Op to_operand(float x) { return (Op)pack_bf16(x, 0.0f); }
#elif IO == 1
typedef u16 Io;
typedef float Op;
typedef u32 RawPair;
DEVICE void unpack(RawPair raw, float& x, float& y) {
    x = half_to_float((u16)raw), y = half_to_float((u16)(raw >> 16));
}
DEVICE RawPair pack(float x, float y) {
    return (u32)float_to_half(x) | (u32)float_to_half(y) << 16;
}
DEVICE Op to_operand(float x) { return x; }
#else
typedef float Io;
typedef float Op;
typedef FloatPair RawPair;
DEVICE void unpack(RawPair raw, float& x, float& y) { x = raw.x, y = raw.y; }
DEVICE RawPair pack(float x, float y) { return RawPair{x, y}; }
DEVICE Op to_operand(float x) { return x; }
#endif

// Eight neighbours of a row, a lane's share where nothing is multiplied.
struct RawEight { Vector x[sizeof(Io) / 2]; };
DEVICE void unpack(const RawEight& raw, float (&x)[8]) {
    const RawPair* pairs = (const RawPair*)&raw;
#pragma unroll
    for (int i = 0; i < 4; i++) unpack(pairs[i], x[2 * i], x[2 * i + 1]);
}
DEVICE RawEight pack(const float (&x)[8]) {
    RawEight raw;
#pragma unroll
    for (int i = 0; i < 4; i++) ((RawPair*)&raw)[i] = pack(x[2 * i], x[2 * i + 1]);
    return raw;
}

DEVICE void store_eight(Io* p, const float (&x)[8]) {
    RawEight raw = pack(x);
#pragma unroll
    for (int i = 0; i < (int)(sizeof(RawEight) / 16); i++) store_global((Vector*)p + i, raw.x[i]);
}

// ------------------------------------------------------------------------------------------------
// A slab of results: 16 rows of 8 * TILES columns.
template <int TILES = N / 8> struct Slab {
    float x[TILES][4];
};

template <int TILES> DEVICE void clear(Slab<TILES>& s) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s.x[j][i] = 0.0f;
}

// Calls f(element, upper or lower half, row in the slab, column) for the elements of this lane.
template <int TILES, class F> DEVICE void each(Slab<TILES>& s, F f) {
    int lane = thread_index() % 32;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            f(s.x[j][i], i / 2, lane / 4 + i / 2 * 8, j * 8 + lane % 4 * 2 + i % 2);
}

// Zeroes the elements for which keep(half, row in the slab, column) is false.
template <int TILES, class F> DEVICE void mask(Slab<TILES>& s, F keep) {
    each(s, [&](float& x, int half, int row, int column) {
        x = keep(half, row, column) ? x : 0.0f;
    });
}

// ------------------------------------------------------------------------------------------------
// Tiles: matrices of rows of N operands in shared memory, named by their offset there in bytes.
typedef u32 Tile;
constexpr int STRIDE = IO == 0 ? N : N + 8;
constexpr u32 ROW_BYTES = STRIDE * sizeof(Op);
DEVICE constexpr u32 tile_bytes(int rows) { return rows * ROW_BYTES; }

// Of bfloat16, the 16-byte pieces of a row are permuted by the row so that eight rows meet all banks.
// The constant part comes last, so that an address is a lane's own offset and one exclusive or.
DEVICE u32 place(int row, int column) {
    if (IO == 0)
        return (u32)(row * 128 + ((row & 7) << 4) + ((column & 7) << 1)) ^ ((column >> 3) << 4);
    return row * ROW_BYTES + column * sizeof(Op);
}
template <class T> DEVICE T& shared_at(u32 offset) { return *(T*)(shared_memory + offset); }

DEVICE void set_pair(Tile tile, int row, int column, float x, float y) {
#if IO == 0
    shared_at<u32>(tile + place(row, column)) = pack_bf16(x, y);
#else
    shared_at<FloatPair>(tile + place(row, column)) = FloatPair{x, y};
#endif
}
DEVICE void set_eight(Tile tile, int row, int column, const float (&x)[8]) {
    Op* at = &shared_at<Op>(tile + place(row, column));
#if IO == 0
    *(RawEight*)at = pack(x);
#else
    ((Vector*)at)[0] = *(const Vector*)x, ((Vector*)at)[1] = *(const Vector*)(x + 4);
#endif
}
DEVICE void get_pair(Tile tile, int row, int column, float& x, float& y) {
#if IO == 0
    u32 bits = shared_at<u32>(tile + place(row, column));
    x = as_float(bits << 16), y = as_float(bits & 0xffff0000u);
#else
    FloatPair pair = shared_at<FloatPair>(tile + place(row, column));
    x = pair.x, y = pair.y;
#endif
}

// ------------------------------------------------------------------------------------------------
// Fragments: a 16x16 piece of an operand, eight numbers a lane.
#if IO == 0
struct Fragment { u32 x[4]; };
DEVICE void set_fragment(Fragment& f, int i, float x, float y) { f.x[i] = pack_bf16(x, y); }
DEVICE void get_fragment(const Fragment& f, int i, float& x, float& y) {
    x = as_float(f.x[i] << 16), y = as_float(f.x[i] & 0xffff0000u);
}
// Lane offsets for matrix loads, rows first or columns first.
DEVICE u32 rows_first() {
    int lane = thread_index() % 32;
    return shared_base() + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
}
DEVICE u32 columns_first() {
    int lane = thread_index() % 32;
    return shared_base() + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2 ^ lane % 8) << 4);
}
// left (r, c) = tile[row0 + r][column0 + c]
DEVICE void load_left(Fragment& f, Tile tile, int row0, int column0) {
    load_matrices(f.x, (rows_first() ^ (u32)(column0 * 2)) + tile + row0 * 128);
}
// left (r, c) = tile[row0 + c][column0 + r]
DEVICE void load_left_transposed(Fragment& f, Tile tile, int row0, int column0) {
    load_matrices_transposed(f.x, (columns_first() ^ (u32)(column0 * 2)) + tile + row0 * 128);
}
// right (c, r) = tile[row0 + r][column0 + c], r of 16, c of 16
DEVICE void load_right(Fragment& f, Tile tile, int row0, int column0) {
    load_matrices(f.x, (columns_first() ^ (u32)(column0 * 2)) + tile + row0 * 128);
}
// right (r, c) = tile[row0 + r][column0 + c]
DEVICE void load_right_transposed(Fragment& f, Tile tile, int row0, int column0) {
    load_matrices_transposed(f.x, (rows_first() ^ (u32)(column0 * 2)) + tile + row0 * 128);
}
DEVICE Fragment as_right(const Fragment& f) { return {f.x[0], f.x[2], f.x[1], f.x[3]}; }
// c += a b for the eight columns of b that `half` names
DEVICE void mma(float (&c)[4], const Fragment& a, const Fragment& b, int half) {
    mma_bf16(c, a.x, b.x[2 * half], b.x[2 * half + 1]);
}
#else
struct Fragment { float x[8]; };
DEVICE void set_fragment(Fragment& f, int i, float x, float y) {
    f.x[2 * i] = x, f.x[2 * i + 1] = y;
}
DEVICE void get_fragment(const Fragment& f, int i, float& x, float& y) {
    x = f.x[2 * i], y = f.x[2 * i + 1];
}
DEVICE void load_left(Fragment& f, Tile tile, int row0, int column0) {
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
        get_pair(tile, row0 + g + i % 2 * 8, column0 + 2 * q + i / 2 * 8, f.x[2 * i],
                 f.x[2 * i + 1]);
}
DEVICE void load_left_transposed(Fragment& f, Tile tile, int row0, int column0) {
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < 8; i++)
        f.x[i] = shared_at<float>(
            tile + place(row0 + 2 * q + i % 2 + i / 4 * 8, column0 + g + i / 2 % 2 * 8));
}
DEVICE Fragment as_right(const Fragment& f) {
    const float* x = f.x;
    return {x[0], x[1], x[4], x[5], x[2], x[3], x[6], x[7]};
}
DEVICE void load_right(Fragment& f, Tile tile, int row0, int column0) {
    load_left(f, tile, row0, column0);
    f = as_right(f);
}
DEVICE void load_right_transposed(Fragment& f, Tile tile, int row0, int column0) {
    load_left_transposed(f, tile, row0, column0);
    f = as_right(f);
}
// A float32 as PARTS TF32 numbers of 11 bits each.
constexpr int PARTS = IO == 1 ? 1 : 3;
template <int COUNT> DEVICE void split(const float (&x)[COUNT], u32 (&parts)[PARTS][COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float rest = x[i];
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            parts[k][i] = to_tf32(rest);
            rest -= as_float(parts[k][i]);
        }
    }
}
DEVICE void mma(float (&c)[4], const Fragment& a, const Fragment& b, int half) {
    // the unit's columns q and q+4 of an operand are ours 2q and 2q+1, on both sides
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const float *l = a.x + 4 * k, *r = b.x + 4 * half + 2 * k;
        u32 left[PARTS][4], right[PARTS][2];
        split({l[0], l[2], l[1], l[3]}, left);
        split({r[0], r[1]}, right);
        // the unit cuts off what it adds where float32 ends, so that sums are made outside, and in
        // it the small terms come first
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int order = PARTS - 1; order >= 0; order--)
#pragma unroll
            for (int i = 0; i <= order; i++) {
                const u32 *x = left[i], *y = right[order - i];
                mma_tf32(sum, x[0], x[1], x[2], x[3], y[0], y[1]);
            }
#pragma unroll
        for (int i = 0; i < 4; i++) c[i] += sum[i];
    }
}
#endif

template <int TILES> DEVICE Fragment fragment(const Slab<TILES>& s, int k) {
    Fragment f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float* pair = s.x[2 * k + i / 2] + i % 2 * 2;
        set_fragment(f, i, pair[0], pair[1]);
    }
    return f;
}

// ------------------------------------------------------------------------------------------------
// Matrices kept as fragments in global memory: piece (slab, k) is contiguous, lane by lane.
DEVICE Op* piece(Op* matrix, int slab, int k, int pieces = N / 16) {
    return matrix + ((slab * pieces + k) * 32 + thread_index() % 32) * 8;
}
DEVICE const Op* piece(const Op* matrix, int slab, int k, int pieces = N / 16) {
    return piece(const_cast<Op*>(matrix), slab, k, pieces);
}
constexpr int VECTORS = sizeof(Fragment) / 16;  // 16-byte vectors of a lane's fragment
DEVICE void store(Op* p, const Fragment& f) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) store_global((Vector*)p + i, ((const Vector*)&f)[i]);
}
DEVICE void load(Fragment& f, const Op* p) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) ((Vector*)&f)[i] = ((const Vector*)p)[i];
}
// A slab of a matrix that will be met as left fragments, or as right ones of its transpose.
template <int TILES> DEVICE void store_left(Op* matrix, int slab, const Slab<TILES>& s) {
#pragma unroll
    for (int k = 0; k < TILES / 2; k++) store(piece(matrix, slab, k, TILES / 2), fragment(s, k));
}
template <int TILES> DEVICE void store_right(Op* matrix, int slab, const Slab<TILES>& s) {
#pragma unroll
    for (int k = 0; k < TILES / 2; k++)
        store(piece(matrix, slab, k, TILES / 2), as_right(fragment(s, k)));
}

// ------------------------------------------------------------------------------------------------
// Products of 16-row slabs.
struct Range { int begin, end; };

// 16 rows of a tile, all channels
struct Rows { Fragment k[N / 16]; };
DEVICE Rows load_rows_of(Tile tile, int row0) {
    Rows rows;
#pragma unroll
    for (int k = 0; k < N / 16; k++) load_left(rows.k[k], tile, row0, k * 16);
    return rows;
}

// 16 rows of a tile as right operands, transposed: over channels, or as they are: over rows. Loaded
// well before they are used, so that the loads run beside other work.
DEVICE Rows load_right_rows(Tile tile, int row0) {
    Rows rows;
#pragma unroll
    for (int k = 0; k < N / 16; k++) load_right(rows.k[k], tile, row0, k * 16);
    return rows;
}
DEVICE Rows load_values(Tile tile, int row0) {
    Rows rows;
#pragma unroll
    for (int j = 0; j < N / 16; j++) load_right_transposed(rows.k[j], tile, row0, j * 16);
    return rows;
}

// c (16 x 16) += left right^T, 16 rows each
DEVICE void add_outer(Slab<2>& c, const Rows& left, const Rows& right) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        mma(c.x[0], left.k[k], right.k[k], 0);
        mma(c.x[1], left.k[k], right.k[k], 1);
    }
}

// s += a values, 16 rows of values
DEVICE void add_piece(Slab<>& s, const Fragment& a, const Rows& values) {
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
        mma(s.x[2 * j], a, values.k[j], 0);
        mma(s.x[2 * j + 1], a, values.k[j], 1);
    }
}
DEVICE void add_piece(Slab<>& s, const Fragment& a, Tile values, int row0) {
    add_piece(s, a, load_values(values, row0));
}

// s += left matrix, or left matrix^T, of a matrix (N, N)
DEVICE void add_matrix(Slab<>& s, const Rows& left, Tile matrix) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) add_piece(s, left.k[k], matrix, k * 16);
}
DEVICE void add_matrix_transposed(Slab<>& s, const Rows& left, Tile matrix) {
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            Fragment b;
            load_right(b, matrix, j * 16, k * 16);
            mma(s.x[2 * j], left.k[k], b, 0);
            mma(s.x[2 * j + 1], left.k[k], b, 1);
        }
}

// s += left[row0..][depth] right[depth][:]
DEVICE void add_product(Slab<>& s, Tile left, int row0, Tile right, Range depth) {
#pragma unroll 1
    for (int k = depth.begin; k < depth.end; k += 16) {
        Fragment a;
        load_left(a, left, row0, k);
        add_piece(s, a, right, k);
    }
}

// s += left[depth][column0..]^T right[depth][:]
DEVICE void add_product_transposed(Slab<>& s, Tile left, int column0, Tile right, Range depth) {
#pragma unroll 1
    for (int k = depth.begin; k < depth.end; k += 16) {
        Fragment a;
        load_left_transposed(a, left, k, column0);
        add_piece(s, a, right, k);
    }
}

// Calls f(tile of s, half, row, column) for the pairs of neighbours that this lane has of a slab.
template <class F> DEVICE void each_pair(F f) {
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) f(j, i, g + i * 8, j * 8 + 2 * q);
}

// rows row0.. of a tile = s
DEVICE void store_tile(Tile tile, int row0, const Slab<>& s) {
    each_pair([&](int j, int i, int row, int column) {
        set_pair(tile, row0 + row, column, s.x[j][2 * i], s.x[j][2 * i + 1]);
    });
}
