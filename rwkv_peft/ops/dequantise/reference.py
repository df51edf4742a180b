"""Dequantising in PyTorch, and the codes of 4 bits."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# numbers that share a scale, as in bitsandbytes
BLOCK = 64
# the 16 numbers of a code by their places: quantiles of a normal (QLoRA, arXiv 2305.14314), and a
# sign, two bits of exponent and one of mantissa, over the largest
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
_FP4_HALF = tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
CODES = {"nf4": NF4, "fp4": (*_FP4_HALF, *(-x if x else x for x in _FP4_HALF))}


def dequantise_reference(
    packed: Tensor, scale: Tensor, storage: str, count: int, dtype: torch.dtype
) -> Tensor:
    """See `ops.dequantise`."""
    if storage == "int8":
        return (packed.float() * scale).to(dtype).flatten()
    values = _pairs(storage, packed.device).index_select(0, packed.flatten().int()).flatten()
    blocks = fill_up(values).view(-1, BLOCK)
    return blocks.mul_(scale[: len(blocks), None]).to(dtype).flatten()[:count]


def fill_up(x: Tensor) -> Tensor:
    """Numbers with zeros behind them, in whole blocks."""
    # padding by nothing is a copy
    return F.pad(x, (0, -len(x) % BLOCK)) if len(x) % BLOCK else x


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
