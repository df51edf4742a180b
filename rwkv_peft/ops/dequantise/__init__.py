"""Dequantising: the dense weight of one that is stored in 8 or 4 bits.

    int8:     w[i, j] = packed[i, j] scale[i]
    nf4, fp4: w[n] = code[packed[n]] scale[n / 64]
    nested:   scale[b] = share[place[b]] largest[b / 256] + mean

Products and sums are in float32, each rounded, and the result once more to the dtype asked for: so
every backend gives the same bits. A backend is called as `kernel(packed, scale, storage, dense)`
and writes into `dense`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_peft.ops import triton
from rwkv_peft.ops.dispatch import Backend, Request, select

Kernel = Callable[[Tensor, Tensor, str, Tensor], None]

TABLE = (
    Backend(
        "cuda",
        "rwkv_peft.ops.dequantise.cuda:dequantise_cuda",
        "rwkv_peft.ops.dequantise.cuda:objection",
        "kernels for NVIDIA GPUs",
    ),
    Backend(
        "triton",
        "rwkv_peft.ops.dequantise.triton:dequantise_triton",
        functools.partial(triton.objection, shared_memory=0),
        "Triton kernels",
    ),
    Backend(
        "torch",
        "rwkv_peft.ops.dequantise.reference:dequantise_reference",
        None,
        "look-ups in PyTorch",
    ),
)
# head sizes are no matter of this operator, and 64 is what all backends serve
_ANY_HEAD = 64


def dequantise(
    packed: Tensor, scale: Tensor, storage: str, count: int, dtype: torch.dtype
) -> Tensor:
    """The first `count` numbers of a stored weight, in their order, (count,).

    Args:
        packed: int8 (rows, in) of int8, all of which is taken; uint8 (numbers / 2, 1) of nf4 and
            fp4, two codes a byte, the first in the upper half. It begins with a block.
        scale: float32, (rows, 1) of int8, (blocks of 64,) of nf4 and fp4. Where they are nested
            uint8 (groups of 256 blocks, 264): 256 places, then `largest` and `mean` in float32.
        storage: 'int8', 'nf4', 'fp4', 'nf4_nested' or 'fp4_nested'.
        dtype: of the result.
    """
    dense = packed.new_empty(count, dtype=dtype)
    if count:
        kernel_for(packed.device, dtype)(packed, scale, storage, dense)
    return dense


@functools.cache
def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The function of the fastest backend on a device."""
    return select("dequantise", TABLE, "auto", Request(device, dtype, _ANY_HEAD)).function
