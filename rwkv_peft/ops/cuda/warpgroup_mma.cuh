// Matrix products by a group of warps, each warp with 16 rows of the chunk. All warps of the group call
// them at the same time, on tiles written before `warpgroup::sync_block` or `warpgroup::sync_group`.
//
// On Hopper the matrix units read a tile from shared memory themselves, once for four warps (wgmma).
// Elsewhere each warp loads what it needs of the tile: four times the traffic, but a causal product
// needs only half of it.
#pragma once
#include "chunk.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA (IO == 0 && C == 64)
#else
#define WGMMA 0
#endif

// Pair products of a slab's rows with the rows of `right`, times those of `values`.
struct Pairs {
    Tile right, values;
    bool with_itself;
};

#if WGMMA
namespace warpgroup {
// After the next barrier the matrix units see what was written to shared memory before this call.
DEVICE void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void sync_block() {
    publish();
    ::sync_block();
}
DEVICE void sync_group(int id) {
    publish();
    ::sync_group(id, GROUP_THREADS);
}

// The descriptor of a tile's rows from row0 on, in units of 16 bytes: from bit 0 on the address, from bit
// 32 on the distance to the next eight rows; bit 62 says that the pieces of a row lie as `place` puts them.
DEVICE u64 make_descriptor(Tile tile, int row0 = 0) {
    return (u64)((shared_base() + tile + row0 * 128) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// s (64 x 64 by four warps) = a b, or += a b; b is 16 rows of a tile, or 16 columns of all transposed
template <bool IS_TRANSPOSED> DEVICE void multiply(Slab<>& s, const Fragment& a, u64 b, bool adds) {
#define FOUR(j) "+f"(s.x[j][0]), "+f"(s.x[j][1]), "+f"(s.x[j][2]), "+f"(s.x[j][3])
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, adds, 1, 1, %38;\n}"
        : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"((int)adds),
          "n"(IS_TRANSPOSED ? 0 : 1));
#undef FOUR
}

// Makes the compiler leave the numbers of s in their registers until here.
DEVICE void hold(Slab<>& s) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(s.x[j][i])::"memory");
}
// Products are started between `begin` and `commit`; their sums are complete after `finish`.
DEVICE void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void finish(Slab<>& s) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(s);
}

DEVICE void start_outer(Slab<>& s, const Rows& left, Tile right, bool adds) {
    u64 b = make_descriptor(right);
#pragma unroll
    for (int k = 0; k < N / 16; k++) multiply<true>(s, left.k[k], b + k * 2, adds || k);
}
DEVICE void start_values(Slab<>& s, const Rows& left, Tile values, bool adds) {
    u64 b = make_descriptor(values);
#pragma unroll
    for (int k = 0; k < C / 16; k++) multiply<false>(s, left.k[k], b + k * 128, adds || k);
}

// s = left matrix, or left matrix^T
DEVICE void set_matrix(Slab<>& s, const Rows& left, Tile matrix) {
    begin();
    start_values(s, left, matrix, false);
    commit();
    finish(s);
}
DEVICE void set_transposed(Slab<>& s, const Rows& left, Tile matrix) {
    begin();
    start_outer(s, left, matrix, false);
    commit();
    finish(s);
}

// The fragments of pair products within bounds
DEVICE Rows mask_pairs(Slab<>& c, const Bounds& b, bool with_itself) {
    Rows rows;
#pragma unroll
    for (int block = 0; block < C / 16; block++) {
        if (block < b.begin || block >= b.end) {
            rows.k[block] = Fragment{};
        } else {
            if (b.is_packed || block == b.slab) mask_block(c.x + 2 * block, block, b, with_itself);
            rows.k[block] = fragment(c, block);
        }
    }
    return rows;
}

// c = left right^T within bounds, of blocks up to the slab's own
DEVICE void set_pairs(Slab<>& c, const Rows& left, Tile right, const Bounds& b, bool with_itself) {
    set_transposed(c, left, right);
#pragma unroll
    for (int block = 0; block < C / 16; block++)
        if (b.is_packed || block == b.slab) mask_block(c.x + 2 * block, block, b, with_itself);
}

// s += (left right^T within bounds) values
DEVICE void add_pairs(Slab<>& s, const Rows& left, const Pairs& p, const Bounds& b) {
    Slab<> c;
    set_transposed(c, left, p.right);
    Rows pairs = mask_pairs(c, b, p.with_itself);
    begin();
    start_values(s, pairs, p.values, true);
    commit();
    finish(s);
}

// The same for two sets of pairs; the first sums are made while the second pair products are.
DEVICE void add_pairs(Slab<>& s, const Rows& left, const Pairs& p, const Pairs& q, const Bounds& b) {
    Slab<> c;
    set_transposed(c, left, p.right);
    Rows pairs = mask_pairs(c, b, p.with_itself);
    Slab<> d;
    begin();
    start_values(s, pairs, p.values, true);
    start_outer(d, left, q.right, false);
    commit();
    finish(s);
    hold(d);
    pairs = mask_pairs(d, b, q.with_itself);
    begin();
    start_values(s, pairs, q.values, true);
    commit();
    finish(s);
}

// s += left[row0..][depth] right[depth][:], or += left[depth][row0..]^T right[depth][:]
template <bool IS_TRANSPOSED>
DEVICE void add_product_of(Slab<>& s, Tile left, int row0, Tile right, Range depth) {
    Rows rows;
#pragma unroll
    for (int k = 0; k < C / 16; k++) {
        if (k * 16 < depth.begin || k * 16 >= depth.end) rows.k[k] = Fragment{};
        else if (IS_TRANSPOSED) load_left_transposed(rows.k[k], left, k * 16, row0);
        else load_left(rows.k[k], left, row0, k * 16);
    }
    begin();
    start_values(s, rows, right, true);
    commit();
    finish(s);
}
DEVICE void add_product(Slab<>& s, Tile left, int row0, Tile right, Range depth) {
    add_product_of<false>(s, left, row0, right, depth);
}
DEVICE void add_product_transposed(Slab<>& s, Tile left, int row0, Tile right, Range depth) {
    add_product_of<true>(s, left, row0, right, depth);
}
}  // namespace warpgroup
#else
namespace warpgroup {
using ::add_product;
using ::add_product_transposed;
using ::sync_block;
DEVICE void sync_group(int id) { ::sync_group(id, GROUP_THREADS); }

DEVICE void set_matrix(Slab<>& s, const Rows& left, Tile matrix) {
    clear(s);
    add_matrix(s, left, matrix);
}
DEVICE void set_transposed(Slab<>& s, const Rows& left, Tile matrix) {
    clear(s);
    add_matrix_transposed(s, left, matrix);
}

// c = left right^T within bounds, of blocks up to the slab's own
DEVICE void set_pairs(Slab<C / 8>& c, const Rows& left, Tile right, const Bounds& b, bool with_itself) {
#pragma unroll
    for (int block = 0; block < C / 16; block++) {
        if (block > b.slab) break;
        Slab<2> part;
        set_block(part, left, load_right_rows(right, block * 16), block, b, with_itself);
#pragma unroll
        for (int i = 0; i < 8; i++) c.x[2 * block + i / 4][i % 4] = part.x[i / 4][i % 4];
    }
}

// s += (left right^T within bounds) values
DEVICE void add_pairs(Slab<>& s, const Rows& left, const Pairs& p, const Bounds& b) {
#pragma unroll 1
    for (int block = b.begin; block < b.end; block++) {
        Rows right = load_right_rows(p.right, block * 16), values = load_values(p.values, block * 16);
        Slab<2> c;
        set_block(c, left, right, block, b, p.with_itself);
        add_piece(s, fragment(c, 0), values);
    }
}

// The same for two sets of pairs, side by side, so that a warp has work while it waits for one.
DEVICE void add_pairs(Slab<>& s, const Rows& left, const Pairs& p, const Pairs& q, const Bounds& b) {
#pragma unroll 1
    for (int block = b.begin; block < b.end; block++) {
        Rows right = load_right_rows(p.right, block * 16), other = load_right_rows(q.right, block * 16);
        Slab<2> c, d;
        clear(c);
        clear(d);
        add_outer(c, left, right);
        add_outer(d, left, other);
        Rows values = load_values(p.values, block * 16), others = load_values(q.values, block * 16);
        if (b.is_packed || block == b.slab) {
            mask_block(c.x, block, b, p.with_itself);
            mask_block(d.x, block, b, q.with_itself);
        }
        add_piece(s, fragment(c, 0), values);
        add_piece(s, fragment(d, 0), others);
    }
}
}  // namespace warpgroup
#endif
