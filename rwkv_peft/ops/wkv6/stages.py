"""WKV-6 on a GPU in stages over chunks of time, all but one of them parallel over the chunks.

A chunk of C tokens scales the columns of the state and adds to it, S_1 = S_0 diag(decay) + P, which
comes from the chunk alone. The gradient of the state goes the same way in reverse, with r and dy in
place of k and v, so that two stages serve both directions:

    forward   chunk (all chunks) -> state (in order)  -> output (all chunks)
    backward  chunk              -> state (reversed)  -> gradients (all chunks)

With g_t the sum of log decays of a chunk up to token t and G that of all, P is v^T (k e^{G - g_i}),
and what is added to the gradient of the entering state is dy^T (r e^{g_{t-1}}). The formulas of the
other two stages are in `chunked`. A backend brings the stages; memory, order, what is kept for the
backward pass and the registration with PyTorch are the same for all and are here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.ops.eager import shortcut

Function = Callable[..., tuple[Tensor, Tensor]]

_library = torch.library.Library("rwkv_peft", "FRAGMENT")


@dataclass(frozen=True, slots=True)
class Stages:
    """What a backend brings: a chunk length, and four functions that fill their last tensors.

    Inputs, y, dy and gradients are (B, T, H, N); u (H, N) is float32; segment_ids (B, T) int32 or
    None. With M chunks of C tokens, added, states and dstates are (B, H, M, N, N), bfloat16 beside
    bfloat16 inputs, else float32; decay and du (B, H, M, N) and single states (B, H, N, N) are
    float32. All are contiguous, and every element must be written.

    Attributes:
        chunk_length: C for inputs of a type on a device.
        chunk: (w, keys, values, segment_ids, reverse; added, decay). What a chunk adds to the state
            of k and v and leaves of it; reversed, of r and dy to the state's gradient.
        state: (added, decay, state | None, reverse; states, last). The states that meet the chunks,
            in order or in reverse, and the one after all.
        output: (r, w, k, v, u, segment_ids, states; y).
        gradients: (r, w, k, v, u, segment_ids, states, dstates, dy; dr, dw, dk, dv, du). dstates
            are of the states that leave the chunks; du has a part of each chunk.
    """

    chunk_length: Callable[[torch.dtype, torch.device], int]
    chunk: Callable[..., None]
    state: Callable[..., None]
    output: Callable[..., None]
    gradients: Callable[..., None]


class _Layout:
    """The tensors between the stages of one call."""

    def __init__(self, r: Tensor, stages: Stages) -> None:
        B, T, H, N = r.shape
        C = stages.chunk_length(r.dtype, r.device)
        self._like, self._chunks, self._state = r, (B, H, (T + C - 1) // C, N), (B, H, N, N)
        self._dtype = r.dtype if r.dtype == torch.bfloat16 else torch.float32

    def matrices(self) -> Tensor:
        return self._like.new_empty((*self._chunks, self._chunks[-1]), dtype=self._dtype)

    def vectors(self) -> Tensor:
        return self._like.new_empty(self._chunks, dtype=torch.float32)

    def state(self) -> Tensor:
        return self._like.new_empty(self._state, dtype=torch.float32)

    def nothing(self) -> Tensor:
        return self._like.new_empty(0, dtype=self._dtype)


def register(name: str, stages: Stages) -> Function:
    """The operator of a backend, with the arguments and results of `wkv6_reference`.

    Registers `rwkv_peft::wkv6_{name}` and its backward form with PyTorch, so that autograd, fake
    tensors and `torch.compile` know them; once a name. Kept for the backward pass are the inputs
    and the states that enter the chunks; without gradients neither.
    """
    forward = _register_forward(name, stages, *_register_backward(name, stages))

    def wkv6_stages(
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor,
        initial_state: Tensor | None,
        segment_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (r, w, k, v, u, initial_state)
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        y, last_state, _ = forward(*tensors, segment_ids, keep)
        return y, last_state

    wkv6_stages.__name__ = f"wkv6_{name}"
    return wkv6_stages


def _register_forward(
    name: str, stages: Stages, backward: Callable[..., Any], registered: Callable[..., Any]
) -> Callable[..., Any]:
    operator = f"rwkv_peft::wkv6_{name}"
    _library.define(
        f"wkv6_{name}(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? initial_state, "
        "Tensor? segment_ids, bool keep) -> (Tensor, Tensor, Tensor)"
    )

    def forward(r, w, k, v, u, initial_state, segment_ids, keep):  # type: ignore[no-untyped-def]
        r, w, k, v = (x.contiguous() for x in (r, w, k, v))
        segment_ids = None if segment_ids is None else segment_ids.contiguous()
        initial_state = None if initial_state is None else initial_state.float().contiguous()
        layout = _Layout(r, stages)
        added, decay, states = layout.matrices(), layout.vectors(), layout.matrices()
        y, last_state = torch.empty_like(r), layout.state()
        stages.chunk(w, k, v, segment_ids, False, added, decay)
        stages.state(added, decay, initial_state, False, states, last_state)
        stages.output(r, w, k, v, u.float().contiguous(), segment_ids, states, y)
        return y, last_state, states if keep else layout.nothing()

    def fake(r, w, k, v, u, initial_state, segment_ids, keep):  # type: ignore[no-untyped-def]
        layout = _Layout(r, stages)
        y = r.new_empty(r.shape)
        return y, layout.state(), layout.matrices() if keep else layout.nothing()

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, initial_state, segment_ids, _ = inputs
        ctx.save_for_backward(*tensors, segment_ids, output[2])
        ctx.has_initial_state = initial_state is not None
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def through(ctx, dy, dlast_state, _dstates, backward=backward):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(saved[0])
        *grads, dinitial_state = backward(*saved, dy, dlast_state)
        return *grads, dinitial_state if ctx.has_initial_state else None, None, None

    _library.impl(f"wkv6_{name}", forward, "CompositeExplicitAutograd")
    torch.library.register_fake(operator, fake, lib=_library)
    torch.library.register_autograd(
        operator,
        functools.partial(through, backward=registered),
        setup_context=setup_context,
        lib=_library,
    )
    called = getattr(torch.ops.rwkv_peft, f"wkv6_{name}").default
    return shortcut(called, forward, setup_context, through)


def _register_backward(name: str, stages: Stages) -> tuple[Callable[..., Any], Callable[..., Any]]:
    operator = f"rwkv_peft::wkv6_{name}_backward"
    _library.define(
        f"wkv6_{name}_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, "
        "Tensor? segment_ids, Tensor states, Tensor dy, Tensor? dlast_state) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def backward(r, w, k, v, u, segment_ids, states, dy, dlast_state):  # type: ignore[no-untyped-def]
        r, w, k, v, dy = (x.contiguous() for x in (r, w, k, v, dy))
        segment_ids = None if segment_ids is None else segment_ids.contiguous()
        dlast_state = None if dlast_state is None else dlast_state.contiguous()
        layout = _Layout(r, stages)
        added, decay, dstates = layout.matrices(), layout.vectors(), layout.matrices()
        dinitial_state, du = layout.state(), layout.vectors()
        stages.chunk(w, r, dy, segment_ids, True, added, decay)
        stages.state(added, decay, dlast_state, True, dstates, dinitial_state)
        grads = [torch.empty_like(r) for _ in range(4)]
        own = u.float().contiguous()
        stages.gradients(r, w, k, v, own, segment_ids, states, dstates, dy, *grads, du)
        return *grads, du.sum((0, 2)).to(u.dtype), dinitial_state

    def fake(r, w, k, v, u, segment_ids, states, dy, dlast_state):  # type: ignore[no-untyped-def]
        layout = _Layout(r, stages)
        return *(r.new_empty(r.shape) for _ in range(4)), u.new_empty(u.shape), layout.state()

    _library.impl(f"wkv6_{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(operator, fake, lib=_library)
    return backward, getattr(torch.ops.rwkv_peft, f"wkv6_{name}_backward").default
