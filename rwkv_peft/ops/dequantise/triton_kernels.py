"""Dequantising as Triton kernels: a program makes BLOCK numbers, or BLOCK pairs of them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("width",))
def rows(packed, scale, dense, width, BLOCK: tl.constexpr):
    """packed (rows, width) int8 times scale (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    x = tl.load(packed + row * width + column, exists).to(tl.float32) * tl.load(scale + row)
    tl.store(dense + row * width + column, x.to(dense.dtype.element_ty), exists)


@triton.jit(do_not_specialize=("count",))
def blocks(packed, scale, codes, dense, count, BLOCK: tl.constexpr):
    """Codes (count / 2,), two a byte, to codes (16,) times scale (count / 64,)."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(packed + byte, byte * 2 < count, 0).to(tl.int32)
    factor = tl.load(scale + byte // 32, byte * 2 < count, 0)
    x = tl.interleave(tl.load(codes + (pair >> 4)) * factor, tl.load(codes + (pair & 15)) * factor)
    number = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(dense + number, x.to(dense.dtype.element_ty), number < count)


@triton.jit(do_not_specialize=("count",))
def nested(packed, places, ends, shares, codes, dense, count, BLOCK: tl.constexpr):
    """As `blocks`, of nested scales: bytes (groups, 264), and `ends` the same in float32."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = byte * 2 < count
    pair = tl.load(packed + byte, exists, 0).to(tl.int32)
    block = byte // 32
    group = block // 256
    share = tl.load(shares + tl.load(places + group * 264 + block % 256, exists, 0).to(tl.int32))
    # compiled without fused products and sums
    scaled = share * tl.load(ends + group * 66 + 64, exists, 0)
    factor = scaled + tl.load(ends + group * 66 + 65, exists, 0)
    x = tl.interleave(tl.load(codes + (pair >> 4)) * factor, tl.load(codes + (pair & 15)) * factor)
    number = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(dense + number, x.to(dense.dtype.element_ty), number < count)
