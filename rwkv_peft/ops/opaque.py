"""Operators written in plain PyTorch, as single operations of a compiled graph."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, Tensor]]

_library = torch.library.Library("rwkv_peft", "FRAGMENT")
_functions: dict[str, Function] = {}


def opaque(function: Function) -> Function:
    """Makes a compiler see one operation in a function whose formulas it cannot look into.

    Outside a compiler nothing changes. Within one, backward computes the forward once more.

    Args:
        function: of (r, ...tensors, initial_state, segment_ids), with results (y, last_state) as
            in `wkv7`.
    """
    name = function.__name__
    _functions[name] = function

    @functools.wraps(function)
    def call(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            y, last_state = torch.ops.rwkv_peft.opaque(name, arguments[:-2], *arguments[-2:])
            return y, last_state
        return function(*arguments)

    return call


def _forward(
    name: str, tensors: list[Tensor], initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y, last_state = _functions[name](*tensors, initial_state, segment_ids)
    return y.contiguous(), last_state.contiguous()


def _fake_forward(
    name: str, tensors: list[Tensor], initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    r = tensors[0]
    B, _, H, N = r.shape
    wide = torch.promote_types(r.dtype, torch.float32)
    return r.new_empty(r.shape), r.new_empty((B, H, N, N), dtype=wide)


def _backward(
    name: str,
    tensors: list[Tensor],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    dy: Tensor,
    dlast_state: Tensor,
) -> list[Tensor]:
    given = [*tensors, *([] if initial_state is None else [initial_state])]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in given]
        first = None if initial_state is None else leaves[-1]
        found = _functions[name](*leaves[: len(tensors)], first, segment_ids)
    grads = torch.autograd.grad(found, leaves, (dy, dlast_state), allow_unused=True)
    return [
        torch.zeros_like(x) if grad is None else grad.contiguous()
        for x, grad in zip(given, grads, strict=True)
    ]


def _fake_backward(
    name: str, tensors: list[Tensor], initial_state: Tensor | None, *_: Tensor | None
) -> list[Tensor]:
    given = [*tensors, *([] if initial_state is None else [initial_state])]
    return [x.new_empty(x.shape) for x in given]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.name, tensors, initial_state, segment_ids = inputs
    ctx.save_for_backward(*tensors, initial_state, segment_ids)


def _gradients(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Any, ...]:
    *tensors, initial_state, segment_ids = ctx.saved_tensors
    grads = torch.ops.rwkv_peft.opaque_backward(
        ctx.name, tensors, initial_state, segment_ids, dy, dlast_state
    )
    last = None if initial_state is None else grads[-1]
    return None, grads[: len(tensors)], last, None


def _register() -> None:
    given = "str name, Tensor[] tensors, Tensor? initial_state, Tensor? segment_ids"
    for name, schema, function, fake in (
        ("opaque", f"({given}) -> (Tensor, Tensor)", _forward, _fake_forward),
        (
            "opaque_backward",
            f"({given}, Tensor dy, Tensor dlast_state) -> Tensor[]",
            _backward,
            _fake_backward,
        ),
    ):
        _library.define(name + schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rwkv_peft::{name}", fake, lib=_library)
    torch.library.register_autograd(
        "rwkv_peft::opaque", _gradients, setup_context=_setup_context, lib=_library
    )


_register()
