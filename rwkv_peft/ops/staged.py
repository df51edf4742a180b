"""Operators made of stages over chunks of time: memory between stages, and what PyTorch knows."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, Tensor]]

_are_transforms_active = torch._C._are_functorch_transforms_active
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


class Memory(NamedTuple):
    """What a call allocates for one thing."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def beside(self, x: Tensor) -> Tensor:
        """The memory, uninitialised, on the device of x."""
        return x.new_empty(self.shape, dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout(NamedTuple):
    """Memory between the stages of one call, with M chunks of C tokens: (B, H, M, ...).

    Matrices are bfloat16 beside bfloat16 inputs and at least float32 beside others, as float16 has
    not the range for them; vectors and single states are float32 or wider.

    Attributes:
        matrices: (N, N) a chunk.
        readout: (C, N) a chunk.
        inverse: (C, C) a chunk.
        vectors: (N,) a chunk.
        state: a single state, (B, H, N, N).
        nothing: in place of matrices that are not kept.
    """

    matrices: Memory
    readout: Memory
    inverse: Memory
    vectors: Memory
    state: Memory
    nothing: Memory


def layout(shape: torch.Size, dtype: torch.dtype, C: int) -> Layout:
    """Of inputs (B, T, H, N) of a type in chunks of C."""
    B, T, H, N = shape
    chunks = (B, H, (T + C - 1) // C)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = dtype if dtype == torch.bfloat16 else wide
    return Layout(
        matrices=Memory((*chunks, N, N), narrow),
        readout=Memory((*chunks, C, N), narrow),
        inverse=Memory((*chunks, C, C), narrow),
        vectors=Memory((*chunks, N), wide),
        state=Memory((B, H, N, N), wide),
        nothing=Memory((0,), narrow),
    )


def contiguous(x: Tensor | None) -> Tensor | None:
    """A tensor without gaps, or None as it is."""
    return None if x is None else x.contiguous()


def register(name: str, forward: Part, backward: Part, kept: int) -> Function:
    """An operator of two parts, called with all tensors, the initial state and the segments.

    Registers `rwkv_peft::{name}` and `rwkv_peft::{name}_backward` with PyTorch, so that autograd,
    fake tensors and `torch.compile` know them; once a name. Without gradients nothing is kept.

    Args:
        forward: (*tensors, initial_state, segment_ids, keep) -> (y, last_state, *rest).
        backward: (*tensors, segment_ids, *kept results, dy, dlast_state) -> (*grads,
            dinitial_state).
        kept: the first of forward's results that backward is given; it is given all from there on.
    """
    registered = _define(f"{name}_backward", backward)
    called = _define(name, forward)
    direct = _direct(forward.function, backward.function, kept)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _save(ctx, inputs[:-1], output, kept)
        ctx.mark_non_differentiable(*output[2:])

    torch.library.register_autograd(
        f"rwkv_peft::{name}",
        lambda ctx, dy, dlast_state, *_: (*_gradients(ctx, registered, dy, dlast_state), None),
        setup_context=setup_context,
        lib=_library,
    )

    def operator(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        grads = torch.is_grad_enabled()
        if _needs_dispatcher(arguments[0]):
            keep = grads and any(x is not None and x.requires_grad for x in arguments)
            y, last_state, *_ = called(*arguments, keep)
        elif grads:
            y, last_state = direct(*arguments)
        else:
            y, last_state, *_ = forward.function(*arguments, False)
        return y, last_state

    operator.__name__ = name
    return operator


def _needs_dispatcher(x: Tensor | None) -> bool:
    """Whether a compiler traces, or x is of a kind or under a transform with a way of its own."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or _are_transforms_active()


def _direct(
    forward: Callable[..., Any], backward: Callable[..., Any], kept: int
) -> Callable[..., Any]:
    """The operator without PyTorch's dispatcher, which can outlast the kernels."""

    # beside a setup_context PyTorch would look at forward's signature at every call
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            keep = True in ctx.needs_input_grad
            results = forward(*inputs, keep)
            if keep:
                _save(ctx, inputs, results, kept)
            return results[:2]

        @staticmethod
        def backward(ctx, dy, dlast_state):  # type: ignore[no-untyped-def]
            # only where the gradients' graph is built can anyone ask for a second derivative
            gradients = _gradients_once if torch.is_grad_enabled() else _gradients
            return gradients(ctx, backward, dy, dlast_state)

    # past Function's own, which looks for transforms, as is done already
    apply: Callable[..., Any] = super(torch.autograd.Function, Direct).apply
    return apply


def _save(ctx, inputs, results, kept):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:-2], inputs[-1], *results[kept:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dy, dlast_state):  # type: ignore[no-untyped-def]
    """Of the tensors, the initial state and the segments."""
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[0])
    *grads, dinitial_state = backward(*saved, dy, dlast_state)
    needs_state = ctx.needs_input_grad[len(grads)]
    return *grads, dinitial_state if needs_state else None, None


_gradients_once = once_differentiable(_gradients)


def _define(name: str, part: Part) -> Callable[..., Any]:
    _library.define(f"{name}{part.schema}")
    _library.impl(name, part.function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rwkv_peft::{name}", part.fake, lib=_library)
    found: Callable[..., Any] = getattr(torch.ops.rwkv_peft, name).default
    return found
