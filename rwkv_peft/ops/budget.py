"""The error budget: how far a kernel's results may be from exact ones.

Three computations of the same inputs are compared: `exact`, the reference in float64; `baseline`,
the same maths in plain PyTorch in the dtype of the inputs; and `result`, the kernel's. Every value
of the result must be finite, and

    max|result - exact| <= 2 max|baseline - exact| + c eps(dtype) max|exact|.

This holds for y, for the last state and for every gradient. So a kernel may err twice as much as
careless PyTorch code does, and by one rounding of the largest value. c is 1 for 16-bit types, whose
sums are kept in float32. A float32 kernel rounds its own sums as well: a matrix product adds N = 64
terms at full magnitude, a random walk of sqrt(64) steps of eps / 2, so c is 4. The baseline seldom
pays that, since decay lets it add small terms first: without c the chunked form would be up to 1.4
times over the budget, in dv, whichever of its products is made exact.

The inputs are those of `cases`: values as in a trained model, extreme decays, packed rows.
`tests/ops/test_gpu.py` holds every backend of every table against the budget, at T from 1 to 4096
and with uninitialised memory filled with NaN, so that a new backend needs no test of its own.
`selfcheck` does it with a few tokens before each run. The budget follows those of attention-gym and
flash-attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class BudgetUse(NamedTuple):
    """Largest error of a result, and the largest that the budget allows."""

    error: float
    allowed: float

    @property
    def share(self) -> float:
        """The part of the budget that the error takes; above 1 it is too large."""
        return self.error / max(self.allowed, 1e-300)


def measure_error(result: Tensor, exact: Tensor, baseline: Tensor) -> BudgetUse:
    """The error of a result and what the budget allows; infinite if a value is not finite.

    Args:
        result, exact, baseline: of one shape, on any devices; see above.
    """

    def error(x: Tensor) -> float:
        # on the device of the exact result: others may have no float64, or be much slower
        return (x.to(exact.device).double() - exact.double()).abs().max().item()

    c = 4 if result.dtype == torch.float32 == baseline.dtype else 1
    allowed = 2 * error(baseline) + c * torch.finfo(result.dtype).eps * exact.abs().max().item()
    is_finite = bool(result.isfinite().all())
    return BudgetUse(error(result) if is_finite else float("inf"), allowed)


def assert_within_budget(result: Tensor, exact: Tensor, baseline: Tensor, name: str = "") -> None:
    """Raises AssertionError unless all values are finite and the error is within the budget."""
    error, allowed = measure_error(result, exact, baseline)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
