"""Whether anything was learned: whether trained tensors are other than they were."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.methods.merge import split_rows

# numbers below this count as zero: multiplied with others and added to a weight, they are lost
TINY = 1e-15
NOTHING_LEARNED = (
    "nothing was learned: no step was taken, or --lr_init is too small to move what is trained"
)


@torch.no_grad()
def digest(values: Mapping[str, Tensor]) -> list[list[int]]:
    """Two numbers of each tensor that differ once one of its float32 values does.

    Sums of integers, which no order of adding changes. One wait for the device, a few rows of
    memory.
    """
    sums = [_digest_one(values[name]) for name in values]
    found: list[list[int]] = torch.stack(sums).tolist() if sums else []
    return found


@torch.no_grad()
def is_unchanged(first: Sequence[Sequence[int]], values: Mapping[str, Tensor]) -> bool:
    """Whether `first` is the digest of these values; most often one tensor is looked at."""
    found = (_digest_one(values[name]).tolist() for name in values)
    return all(list(own) == other for own, other in zip(first, found, strict=True))


def _digest_one(value: Tensor) -> Tensor:
    total = torch.zeros(2, dtype=torch.int64)
    for rows in split_rows(value.detach().float()):
        bits = F.hardshrink(rows, TINY).contiguous().view(torch.int32).to(torch.int64)
        total = total.to(bits.device) + torch.stack((bits.sum(), bits.square().sum()))
    return total
