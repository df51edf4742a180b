"""The chosen kernel against the reference, on the user's own device, before it is relied on."""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.errors import BackendUnavailableError, TrainingError
from rwkv_peft.ops.dispatch import Choice, Request
from rwkv_peft.ops.testing import OPERATORS, Case, Deviation, batched, deviation, run

# more than a chunk of 64, and no multiple of any
TOKENS = 83
ROWS, HEADS = 2, 2
# plain PyTorch, which the tests prove on a CPU
PROVEN = ("torch", "reference")


@dataclass(frozen=True, slots=True)
class Check:
    """How a kernel did.

    Attributes:
        name: of the backend.
        deviations: of y, the last state and every gradient, by name.
        seconds: of its forward and backward, the first one, which may compile.
    """

    name: str
    deviations: dict[str, Deviation]
    seconds: float

    @property
    def worst(self) -> str:
        """The result that takes most of its budget."""
        return max(self.deviations, key=lambda name: self.deviations[name].share)

    @property
    def share(self) -> float:
        """The part of its budget that the worst result takes."""
        return self.deviations[self.worst].share

    @property
    def has_passed(self) -> bool:
        """Whether every result is within its budget."""
        return self.share <= 1

    def describe(self) -> str:
        """The figures in a line for a person."""
        error, allowed = self.deviations[self.worst]
        if math.isinf(error):
            return f"{self.worst} holds values that are not finite"
        return f"{self.worst} is off by {error:.1e}, {allowed:.1e} is allowed"


def check(choice: Choice, request: Request, *, packed: bool = False, heads: int = 1) -> Check:
    """The errors of a backend's results and gradients on a few dozen tokens with a state.

    Exact is the float64 reference and plain the same maths in the kernel's type, both on the CPU,
    since not every device has float64.

    Args:
        packed: whether the rows hold several documents.
        heads: the least number of rows times heads, by which backends choose among their kernels.
    Raises:
        BackendUnavailableError: the kernel does not run; the message names the next to try.
    """
    case, *others = _yardstick(choice.operator, request.head_size, request.dtype, packed)
    copies = -(-heads // (ROWS * HEADS))
    case = batched([case] * copies)
    exact, plain = ({name: _again(name, x, copies) for name, x in y.items()} for y in others)
    started = time.perf_counter()
    with _full_float32():
        found = _run(
            choice, request, lambda: run(case.to(request.dtype, request.device), choice.function)
        )
    seconds = time.perf_counter() - started
    deviations = {name: deviation(x, exact[name], plain[name]) for name, x in found.items()}
    return Check(choice.name, deviations, seconds)


def _again(name: str, x: Tensor, copies: int) -> Tensor:
    """A result of rows that come so many times; u has a sum over them."""
    return x * copies if name == "du" else x.repeat(copies, *[1] * (x.ndim - 1))


@functools.cache
def _yardstick(
    name: str, head_size: int, dtype: torch.dtype, packed: bool
) -> tuple[Case, dict[str, Tensor], dict[str, Tensor]]:
    operator = OPERATORS[name]
    case = operator.make_case(B=ROWS, T=TOKENS, H=HEADS, N=head_size, packed=packed, dtype=dtype)
    return case, run(case.to(torch.float64), operator.reference), run(case, operator.plain)


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
    # the errors of its compiler are of no class that Python has
    errors = sys.modules.get("triton.errors")
    return (errors.TritonError,) if errors else ()


@contextmanager
def _full_float32() -> Iterator[None]:
    # the budget is that of the type, which TF32 rounds more coarsely than
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
