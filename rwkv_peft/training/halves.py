"""Float32 numbers as bf16 numbers and the 16 bits that these lack."""

import torch
from torch import Tensor


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `split` was given, bit for bit."""
    wide = high.float()
    wide.view(torch.int32).add_(low)
    return wide


def split(wide: Tensor, high: Tensor, low: Tensor) -> None:
    """Writes float32 numbers as nearest bf16 numbers and the bits they lack; overwrites `wide`.

    Ties go away from zero: rounded half up, the bits of a number are at most 0x7fff above and
    0x8000 below the multiple of 0x10000 that becomes `high`, which an int16 holds. Rounded to
    even, a tie may be 0x8000 above.

    Args:
        wide: float32.
        high, low: bfloat16 and int16 of the same shape, written.
    """
    bits = wide.view(torch.int32)
    # the lower half, taken for a signed number, is what is missing
    low.copy_(bits)
    high.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
