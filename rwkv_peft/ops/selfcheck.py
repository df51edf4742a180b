"""The check of the chosen backend against the reference, on the user's device, before a run."""

import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.device import full_float32
from rwkv_peft.errors import BackendUnavailableError, TrainingError
from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.budget import BudgetUse, measure_error
from rwkv_peft.ops.cases import Case, join_cases, run
from rwkv_peft.ops.dispatch import Choice, Request

# more than a chunk of 64, and not a multiple of any chunk
TOKENS = 83
ROWS, HEADS = 2, 2
# plain PyTorch, which the tests prove on a CPU
PROVEN = ("torch", "reference")


@dataclass(frozen=True, slots=True)
class Check:
    """The errors of a backend, beside what the budget allows.

    Attributes:
        name: the backend's.
        errors: those of y, the last state and every gradient, by name.
        seconds: time of its first forward and backward pass, which may compile.
    """

    name: str
    errors: dict[str, BudgetUse]
    seconds: float

    @property
    def worst(self) -> str:
        """The name of the result that takes most of its budget."""
        return max(self.errors, key=lambda name: self.errors[name].share)

    @property
    def share(self) -> float:
        """The part of its budget that the worst result takes."""
        return self.errors[self.worst].share

    @property
    def has_passed(self) -> bool:
        """Whether every result is within its budget."""
        return self.share <= 1

    def describe(self) -> str:
        """The figures in a line for a person."""
        error, allowed = self.errors[self.worst]
        if math.isinf(error):
            return f"{self.worst} holds values that are not finite"
        return f"{self.worst} is off by {error:.1e}, {allowed:.1e} is allowed"


def check(choice: Choice, request: Request, *, packed: bool = False, heads: int = 1) -> Check:
    """The errors of a backend's results and gradients on a few dozen tokens with a state.

    The exact results and the baseline are computed on the CPU, since not every device has float64.

    Args:
        packed: whether the rows hold several documents.
        heads: the least number of rows times heads; backends choose among their kernels by it.
    Raises:
        BackendUnavailableError: the kernel does not run; the message names the next to try.
    """
    case, *others = _expected(choice.operator, request.head_size, request.dtype, packed)
    copies = -(-heads // (ROWS * HEADS))
    case = join_cases([case] * copies)
    exact, baseline = ({n: _repeat(n, x, copies) for n, x in y.items()} for y in others)
    started = time.perf_counter()
    with full_float32():
        found = _run(
            choice, request, lambda: run(case.to(request.dtype, request.device), choice.function)
        )
    seconds = time.perf_counter() - started
    errors = {name: measure_error(x, exact[name], baseline[name]) for name, x in found.items()}
    return Check(choice.name, errors, seconds)


def _repeat(name: str, x: Tensor, copies: int) -> Tensor:
    """A result for rows that are repeated `copies` times; du is a sum over the rows."""
    return x * copies if name == "du" else x.repeat(copies, *[1] * (x.ndim - 1))


@functools.cache
def _expected(
    name: str, head_size: int, dtype: torch.dtype, packed: bool
) -> tuple[Case, dict[str, Tensor], dict[str, Tensor]]:
    """A case, its exact results and the baseline's."""
    operator = OPERATORS[name]
    case = operator.make_case(B=ROWS, T=TOKENS, H=HEADS, N=head_size, packed=packed, dtype=dtype)
    return case, run(case.to(torch.float64), operator.reference), run(case, operator.baseline)


def require_right(
    choice: Choice, request: Request, *, packed: bool = False, heads: int = 1
) -> str | None:
    """Checks a chosen backend and says so in a line for the log; None where there is no need.

    Args:
        packed, heads: see `check`.
    Raises:
        TrainingError: it is wrong on this device; the message has the figures.
        BackendUnavailableError: it does not run on this device.
    """
    if request.device.type == "cpu" and choice.name in PROVEN:
        return None
    done = check(choice, request, packed=packed, heads=heads)
    dtype = str(request.dtype).removeprefix("torch.")
    if not done.has_passed:
        raise TrainingError(
            f"op='{choice.name}' computes {choice.operator} wrongly on this device in {dtype}: "
            f"{done.describe()}; {_advice(choice)}"
        )
    return (
        f"check: op {choice.name} agrees with the float64 reference in {dtype} on {TOKENS} tokens: "
        f"{done.describe()} ({done.seconds:.2f} s)"
    )


def _advice(choice: Choice) -> str:
    if not choice.others:
        return "no other backend can serve on this device: use --accelerator cpu"
    return f"use --op {choice.others[0]}"


def _run(
    choice: Choice, request: Request, function: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    try:
        return {name: x.cpu() for name, x in function().items()}
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, ImportError, *_triton_errors()) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendUnavailableError(
            f"op='{choice.name}' does not run on {request.device}: {lines[0]}; {_advice(choice)}"
        ) from error


def _triton_errors() -> tuple[Any, ...]:
    # Triton's compiler has error classes of its own
    errors = sys.modules.get("triton.errors")
    return (errors.TritonError,) if errors else ()
