"""Operators made of stages over chunks of time: the memory between them, autograd, registration."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.dequantise.ahead import begin_recurrence

Function = Callable[..., tuple[Tensor, Tensor]]

_are_transforms_active = torch._C._are_functorch_transforms_active
_library = torch.library.Library("rwkv_peft", "FRAGMENT")


class Part(NamedTuple):
    """One direction of an operator, forward or backward.

    Attributes:
        schema: arguments and results in the notation of `torch.library`.
        function: computes the results.
        fake: gives empty results of the right shapes and dtypes.
    """

    schema: str
    function: Callable[..., Any]
    fake: Callable[..., Any]


class Memory(NamedTuple):
    """Shape and dtype of a tensor that a call allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def allocate(self, beside: Tensor) -> Tensor:
        """The memory, uninitialised, on the device of another tensor."""
        return beside.new_empty(self.shape, dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout(NamedTuple):
    """Memory between the stages of one call, with M chunks of C tokens.

    Matrices are bfloat16 beside bfloat16 inputs and at least float32 beside others, since the range
    of float16 is too small for them; vectors and single states are at least float32.

    Attributes:
        matrices: (B, H, M, N, N).
        readout: (B, H, M, C, N).
        inverse: (B, H, M, C, C).
        vectors: (B, H, M, N).
        state: (B, H, N, N), a single state.
        nothing: (0,), in place of matrices that are not kept.
    """

    matrices: Memory
    readout: Memory
    inverse: Memory
    vectors: Memory
    state: Memory
    nothing: Memory


def make_layout(shape: torch.Size, dtype: torch.dtype, C: int) -> Layout:
    """The layout for inputs (B, T, H, N) of a dtype in chunks of C tokens."""
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
    """A contiguous tensor, or None for None."""
    return None if x is None else x.contiguous()


def register(name: str, forward: Part, backward: Part, kept: int) -> Function:
    """An operator of two parts, called with all tensors, the initial state and the segment ids.

    Registers `rwkv_peft::{name}` and `rwkv_peft::{name}_backward` with PyTorch, so that autograd,
    fake tensors and `torch.compile` know them. A name can be registered once. Where no gradient is
    needed nothing is kept.

    Args:
        forward: (*tensors, initial_state, segment_ids, keep) -> (y, last_state, *rest).
        backward: (*tensors, segment_ids, *kept results, dy, dlast_state) -> (*grads,
            dinitial_state).
        kept: index of the first of forward's results that backward gets; it gets all from there on.
    """
    forward, backward = _announced(forward), _announced(backward)
    registered = _define(f"{name}_backward", backward)
    called = _define(name, forward)
    direct = _direct(forward.function, backward.function, kept)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
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
    """Whether a compiler traces, x is a subclass of Tensor, or a transform of torch.func is on."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or _are_transforms_active()


def _direct(
    forward: Callable[..., Any], backward: Callable[..., Any], kept: int
) -> Callable[..., Any]:
    """The operator without PyTorch's dispatcher, which can take longer than the kernels."""

    # with a setup_context PyTorch would inspect forward's signature at every call
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor | None) -> Any:
            keep = True in ctx.needs_input_grad
            results = forward(*inputs, keep)
            if keep:
                _save(ctx, inputs, results, kept)
            return results[:2]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # a second derivative can be asked for only where a graph of the gradients is built
            gradients = _gradients_once if torch.is_grad_enabled() else _gradients
            return gradients(ctx, backward, *grads)

    # not Function.apply, which looks for transforms again
    apply: Callable[..., Any] = super(torch.autograd.Function, Direct).apply
    return apply


def _save(
    ctx: Any, inputs: tuple[Tensor | None, ...], results: tuple[Tensor, ...], kept: int
) -> None:
    ctx.save_for_backward(*inputs[:-2], inputs[-1], *results[kept:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, backward: Callable[..., Any], dy: Tensor | None, dlast_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors, of the initial state and, None, of the segment ids."""
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[0])
    *grads, dinitial_state = backward(*saved, dy, dlast_state)
    needs_state = ctx.needs_input_grad[len(grads)]
    return *grads, dinitial_state if needs_state else None, None


_gradients_once = once_differentiable(_gradients)


def _announced(part: Part) -> Part:
    """A part that says when it begins."""

    def function(*arguments: Any) -> Any:
        begin_recurrence()
        return part.function(*arguments)

    return part._replace(function=function)


def _define(name: str, part: Part) -> Callable[..., Any]:
    _library.define(f"{name}{part.schema}")
    _library.impl(name, part.function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rwkv_peft::{name}", part.fake, lib=_library)
    found: Callable[..., Any] = getattr(torch.ops.rwkv_peft, name).default
    return found
