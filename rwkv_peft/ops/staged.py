"""Operators made of stages over chunks of time: memory between stages, and what PyTorch knows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, Tensor]]

_library = torch.library.Library("rwkv_peft", "FRAGMENT")


class Part(NamedTuple):
    """One direction of an operator.

    Attributes:
        schema: its arguments and results, as `torch.library` has them.
        function: computes it.
        fake: gives empty results of the right shapes and types.
    """

    schema: str
    function: Callable[..., Any]
    fake: Callable[..., Any]


class Layout:
    """The tensors between the stages of one call, for inputs like `r` (B, T, H, N) in chunks of C.

    With M chunks, all are (B, H, M, ...), but single states (B, H, N, N). Matrices are bfloat16
    beside bfloat16 inputs and at least float32 beside others, as float16 has not the range for
    them; vectors and single states are float32 or wider.
    """

    def __init__(self, r: Tensor, C: int) -> None:
        B, T, H, N = r.shape
        self._like, self._N, self._C = r, N, C
        self._chunks, self._state = (B, H, (T + C - 1) // C), (B, H, N, N)
        self._wide = torch.promote_types(r.dtype, torch.float32)
        self._narrow = r.dtype if r.dtype == torch.bfloat16 else self._wide

    def matrices(self) -> Tensor:
        """(N, N) a chunk."""
        return self._scratch(self._N, self._N)

    def readout(self) -> Tensor:
        """(C, N) a chunk."""
        return self._scratch(self._C, self._N)

    def inverse(self) -> Tensor:
        """(C, C) a chunk."""
        return self._scratch(self._C, self._C)

    def vectors(self) -> Tensor:
        """(N,) a chunk."""
        return self._like.new_empty((*self._chunks, self._N), dtype=self._wide)

    def state(self) -> Tensor:
        """A single state."""
        return self._like.new_empty(self._state, dtype=self._wide)

    def nothing(self) -> Tensor:
        """In place of matrices that are not kept."""
        return self._like.new_empty(0, dtype=self._narrow)

    def _scratch(self, rows: int, columns: int) -> Tensor:
        return self._like.new_empty((*self._chunks, rows, columns), dtype=self._narrow)


def contiguous(x: Tensor | None) -> Tensor | None:
    """A tensor without gaps, or None as it is."""
    return None if x is None else x.contiguous()


def register(name: str, forward: Part, backward: Part, kept: tuple[int, ...]) -> Function:
    """An operator of two parts, called with all tensors, the initial state and the segments.

    Registers `rwkv_peft::{name}` and `rwkv_peft::{name}_backward` with PyTorch, so that autograd,
    fake tensors and `torch.compile` know them; once a name. Without gradients nothing is kept.

    Args:
        forward: (*tensors, initial_state, segment_ids, keep) -> (y, last_state, *rest).
        backward: (*tensors, segment_ids, *kept results, dy, dlast_state) -> (*grads,
            dinitial_state).
        kept: which of forward's results backward is given, in its order.
    """
    registered = _define(f"{name}_backward", backward)
    called = _define(name, forward)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, initial_state, segment_ids, _ = inputs
        ctx.save_for_backward(*tensors, segment_ids, *(output[i] for i in kept))
        ctx.has_initial_state = initial_state is not None
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def through(ctx, dy, dlast_state, *_, backward=backward.function):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(saved[0])
        *grads, dinitial_state = backward(*saved, dy, dlast_state)
        return *grads, dinitial_state if ctx.has_initial_state else None, None, None

    torch.library.register_autograd(
        f"rwkv_peft::{name}",
        functools.partial(through, backward=registered),
        setup_context=setup_context,
        lib=_library,
    )
    call = _shortcut(called, forward.function, setup_context, through)

    def operator(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        *tensors, _ = arguments
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        y, last_state, *_ = call(*arguments, keep)
        return y, last_state

    operator.__name__ = name
    return operator


def _define(name: str, part: Part) -> Callable[..., Any]:
    _library.define(f"{name}{part.schema}")
    _library.impl(name, part.function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rwkv_peft::{name}", part.fake, lib=_library)
    found: Callable[..., Any] = getattr(torch.ops.rwkv_peft, name).default
    return found


def _shortcut(
    operator: Callable[..., Any],
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What `operator` computes without PyTorch's dispatcher, which can outlast the kernels.

    Where something else must see the call, it is the operator itself.
    """
    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(once_differentiable(backward)),
    }
    direct: Any = type("Direct", (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        # a compiler traces the operator, and tensors of other kinds have their own way with it
        if torch.compiler.is_compiling() or type(arguments[0]) is not Tensor:
            return operator(*arguments)
        return direct.apply(*arguments) if arguments[-1] else forward(*arguments)

    return call
