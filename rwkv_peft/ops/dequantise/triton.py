"""Dequantising by Triton kernels, one launch a weight."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_peft.ops.dequantise import triton_kernels as kernels
from rwkv_peft.ops.dequantise.reference import NESTED, code_table, share_table
from rwkv_peft.ops.triton import Launcher, Variant

_BLOCK = 1024
_rows = Launcher(kernels.rows, num_warps=4)
_blocks = Launcher(kernels.blocks, num_warps=4)
_nested = Launcher(kernels.nested, num_warps=4, is_fused=False)


def dequantise_triton(packed: Tensor, scale: Tensor, storage: str, dense: Tensor) -> None:
    """See `ops.dequantise`."""
    count = len(dense)
    if storage == "int8":
        rows, width = packed.shape
        grid = (rows, -(-width // _BLOCK), 1)
        _rows(grid, (packed, scale, dense), (width,), (_BLOCK,))
        return
    grid = (-(-count // (2 * _BLOCK)), 1, 1)
    codes = code_table(storage, packed.device)
    if storage in NESTED:
        scales = scale, scale.view(torch.float32), share_table(packed.device)
        _nested(grid, (packed, *scales, codes, dense), (count,), (_BLOCK,))
    else:
        _blocks(grid, (packed, scale, codes, dense), (count,), (_BLOCK,))


def variants() -> Iterator[Variant]:
    """All that these kernels are compiled to."""
    for io in ("*bf16", "*fp16", "*fp32"):
        yield _rows, ("*i8", "*fp32", io, "i32", _BLOCK)
        yield _blocks, ("*u8", "*fp32", "*fp32", io, "i32", _BLOCK)
        yield _nested, ("*u8", "*u8", *["*fp32"] * 3, io, "i32", _BLOCK)
