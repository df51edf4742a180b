"""Dequantising in PyTorch, the codes of 4 bits, and those of scales in 8."""

import struct
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# numbers that share a scale, and nested scales that share theirs, as in bitsandbytes
BLOCK, GROUP = 64, 256
# bytes of a group of nested scales: their codes, and two float32
GROUP_BYTES = GROUP + 8
# the 16 numbers of a code by their places: quantiles of a normal (QLoRA, arXiv 2305.14314), and a
# sign, two bits of exponent and one of mantissa, over the largest
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
_FP4_HALF = tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
CODES = {"nf4": NF4, "fp4": (*_FP4_HALF, *(-x if x else x for x in _FP4_HALF))}
NESTED = tuple(f"{name}_nested" for name in CODES)
CODES |= {name: CODES[name.removesuffix("_nested")] for name in NESTED}


def dequantise_reference(packed: Tensor, scale: Tensor, storage: str, dense: Tensor) -> None:
    """See `ops.dequantise`."""
    if storage == "int8":
        dense.view(packed.shape).copy_(packed.float() * scale)
        return
    values = _pairs(storage, packed.device).index_select(0, packed.flatten().int()).flatten()
    scale = expand(scale) if storage in NESTED else scale
    blocks = fill_up(values).view(-1, BLOCK)
    dense.copy_(blocks.mul_(scale[: len(blocks), None]).flatten()[: len(dense)])


def expand(scale: Tensor) -> Tensor:
    """The float32 scales (groups * 256,) of nested ones (groups, 264)."""
    shares = share_table(scale.device).index_select(0, scale[:, :GROUP].flatten().int())
    largest, mean = scale[:, GROUP:].view(torch.float32).split(1, dim=1)
    # two operations, each of which rounds
    return shares.view(-1, GROUP).mul_(largest).add_(mean).flatten()


def span(storage: str) -> int:
    """Numbers whose scales are one item of the first dimension of `scale`."""
    return BLOCK * GROUP if storage in NESTED else BLOCK


def fill_up(x: Tensor, size: int = BLOCK) -> Tensor:
    """Numbers with zeros behind them, in whole blocks."""
    # padding by nothing is a copy
    return F.pad(x, (0, -len(x) % size)) if len(x) % size else x


@cache
def code_table(storage: str, device: torch.device) -> Tensor:
    """The 16 numbers of a code, float32."""
    with torch.inference_mode(False):
        return torch.tensor(CODES[storage], device=device)


@cache
def _pairs(storage: str, device: torch.device) -> Tensor:
    """The two numbers (256, 2) of each byte."""
    with torch.inference_mode(False):
        code = code_table(storage, device)
        return torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)


@cache
def share_table(device: torch.device) -> Tensor:
    """The 256 shares of a group's largest that codes of 8 bits stand for, float32, ascending.

    Those of a dynamic data type (arXiv 1511.04561): seven decades, the next larger in twice as many
    steps. Computed in float32 as bitsandbytes does, by float64 on any machine alike.
    """
    shares = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        step = _rounded(_rounded(1 - _rounded(0.1)) / count)
        # from the nearer end, as PyTorch does
        ends = [
            _rounded(_rounded(0.1) + i * step if 2 * i < count else 1 - (count - i) * step)
            for i in range(count + 1)
        ]
        factor = _rounded(10.0 ** (decade - 6))
        for low, high in pairwise(ends):
            share = _rounded(factor * _rounded((low + high) / 2))
            shares += share, -share
    with torch.inference_mode(False):
        return torch.tensor(sorted(shares), device=device)


def _rounded(x: float) -> float:
    """The nearest float32."""
    (found,) = struct.unpack("f", struct.pack("f", x))
    return float(found)
