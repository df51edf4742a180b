"""WKV-7 on a GPU in six stages over chunks of time, four of them parallel over all chunks.

A chunk of C tokens changes the state by one affine map, S_1 = S_0 (diag(decay) + X) + P: X, the
transition, is what the tokens' a and b do to what was there, P, added, is what the chunk writes on
its own. Both come from the chunk alone, so that only this one product a chunk is sequential:

    forward   chunk_forward (all chunks) -> state_forward (in order)  -> output (all chunks)
    backward  chunk_backward             -> state_backward (reversed) -> gradients

A backend brings the six stages; memory, order, what is kept for the backward pass and the
registration with PyTorch are the same for all and are here. `torch_stages` holds the formulas.
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
    """What a backend brings: a chunk length, and six functions that fill their last tensors.

    Inputs, y, dy and gradients are (B, T, H, N); segment_ids (B, T) int32 or None. With M chunks of
    C tokens, transition, added, states and dstates are (B, H, M, N, N), readout (B, H, M, C, N) and
    inverse (B, H, M, C, C), all of `scratch_dtype`; decay (B, H, M, N) and single states
    (B, H, N, N) are float32. All are contiguous, and every element must be written, also in the
    rows of readout and inverse that belong to padding tokens.

    Attributes:
        chunk_length: C for a type of the inputs and a device.
        chunk_forward: (r, w, k, v, a, b, segment_ids; y, transition, added, decay, readout,
            inverse). What a chunk does without the state that enters it. inverse may be None.
        state_forward: (transition, added, decay, initial_state | None; states, last_state). The
            states that enter the chunks, and the one that leaves the last.
        output: (readout, states; y). Adds to y what the tokens read from the entering state.
        chunk_backward: (r, w, a, b, segment_ids, inverse, dy; transition, added, decay). As in
            chunk_forward; added is what dy gives to the gradient of the entering state.
        state_backward: (transition, added, decay, dlast_state | None; dstates, dinitial_state). The
            gradients of the states that leave the chunks, and of the one that enters the first.
        gradients: (r, w, k, v, a, b, segment_ids, inverse, states, last_state, dstates, dy; dr, dw,
            dk, dv, da, db).
    """

    chunk_length: Callable[[torch.dtype, torch.device], int]
    chunk_forward: Callable[..., None]
    state_forward: Callable[..., None]
    output: Callable[..., None]
    chunk_backward: Callable[..., None]
    state_backward: Callable[..., None]
    gradients: Callable[..., None]


def scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of what passes between stages: float16 has not the range for it."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


class _Layout:
    """The tensors between the stages of one call."""

    def __init__(self, r: Tensor, chunk: int) -> None:
        B, T, H, N = r.shape
        M = (T + chunk - 1) // chunk
        self._like, self._dtype = r, scratch_dtype(r.dtype)
        self._wide = torch.promote_types(r.dtype, torch.float32)
        self._chunks, self._state = (B, H, M), (B, H, N, N)
        self._N, self._C = N, chunk

    def _scratch(self, rows: int, columns: int) -> Tensor:
        return self._like.new_empty((*self._chunks, rows, columns), dtype=self._dtype)

    def matrices(self) -> Tensor:
        return self._scratch(self._N, self._N)

    def readout(self) -> Tensor:
        return self._scratch(self._C, self._N)

    def inverse(self) -> Tensor:
        return self._scratch(self._C, self._C)

    def decay(self) -> Tensor:
        return self._like.new_empty((*self._chunks, self._N), dtype=self._wide)

    def state(self) -> Tensor:
        return self._like.new_empty(self._state, dtype=self._wide)

    def nothing(self) -> Tensor:
        return self._like.new_empty(0, dtype=self._dtype)


def register(name: str, stages: Stages) -> Function:
    """The operator of a backend, with the arguments and results of `wkv7_reference`.

    Registers `rwkv_peft::wkv7_{name}` and its backward form with PyTorch, so that autograd, fake
    tensors and `torch.compile` know them; once a name. Kept for the backward pass are the inputs,
    the states that enter the chunks and leave the last, and the inverses; only if it will come.
    """
    forward = _register_forward(name, stages, *_register_backward(name, stages))

    def wkv7_stages(
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        initial_state: Tensor | None,
        segment_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (r, w, k, v, a, b, initial_state)
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        y, last_state, _, _ = forward(*tensors, segment_ids, keep)
        return y, last_state

    wkv7_stages.__name__ = f"wkv7_{name}"
    return wkv7_stages


def _register_forward(
    name: str, stages: Stages, backward: Callable[..., Any], registered: Callable[..., Any]
) -> Callable[..., Any]:
    operator = f"rwkv_peft::wkv7_{name}"
    _library.define(
        f"wkv7_{name}(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, "
        "Tensor? initial_state, Tensor? segment_ids, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def forward(r, w, k, v, a, b, initial_state, segment_ids, keep):  # type: ignore[no-untyped-def]
        r, w, k, v, a, b = inputs = [x.contiguous() for x in (r, w, k, v, a, b)]
        segment_ids = None if segment_ids is None else segment_ids.contiguous()
        initial_state = None if initial_state is None else initial_state.contiguous()
        layout = _Layout(r, stages.chunk_length(r.dtype, r.device))
        y, decay, readout = torch.empty_like(r), layout.decay(), layout.readout()
        transition, added, states = (layout.matrices() for _ in range(3))
        last_state, inverse = layout.state(), layout.inverse() if keep else None
        stages.chunk_forward(*inputs, segment_ids, y, transition, added, decay, readout, inverse)
        stages.state_forward(transition, added, decay, initial_state, states, last_state)
        stages.output(readout, states, y)
        if inverse is None:
            return y, last_state, layout.nothing(), layout.nothing()
        return y, last_state, states, inverse

    def fake(r, w, k, v, a, b, initial_state, segment_ids, keep):  # type: ignore[no-untyped-def]
        layout = _Layout(r, stages.chunk_length(r.dtype, r.device))
        y = r.new_empty(r.shape)
        if not keep:
            return y, layout.state(), layout.nothing(), layout.nothing()
        return y, layout.state(), layout.matrices(), layout.inverse()

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, initial_state, segment_ids, _ = inputs
        _, last_state, states, inverse = output
        ctx.save_for_backward(*tensors, segment_ids, states, last_state, inverse)
        ctx.has_initial_state = initial_state is not None
        ctx.mark_non_differentiable(states, inverse)
        ctx.set_materialize_grads(False)

    def through(ctx, dy, dlast_state, _dstates, _dinverse, backward=backward):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(saved[0])
        *grads, dinitial_state = backward(*saved, dy, dlast_state)
        return *grads, dinitial_state if ctx.has_initial_state else None, None, None

    _library.impl(f"wkv7_{name}", forward, "CompositeExplicitAutograd")
    torch.library.register_fake(operator, fake, lib=_library)
    torch.library.register_autograd(
        operator,
        functools.partial(through, backward=registered),
        setup_context=setup_context,
        lib=_library,
    )
    called = getattr(torch.ops.rwkv_peft, f"wkv7_{name}").default
    return shortcut(called, forward, setup_context, through)


def _register_backward(name: str, stages: Stages) -> tuple[Callable[..., Any], Callable[..., Any]]:
    operator = f"rwkv_peft::wkv7_{name}_backward"
    _library.define(
        f"wkv7_{name}_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, "
        "Tensor? segment_ids, Tensor states, Tensor last_state, Tensor inverse, Tensor dy, "
        "Tensor? dlast_state) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def backward(  # type: ignore[no-untyped-def]
        r, w, k, v, a, b, segment_ids, states, last_state, inverse, dy, dlast_state
    ):
        r, w, k, v, a, b, dy = (x.contiguous() for x in (r, w, k, v, a, b, dy))
        segment_ids = None if segment_ids is None else segment_ids.contiguous()
        dlast_state = None if dlast_state is None else dlast_state.contiguous()
        layout = _Layout(r, stages.chunk_length(r.dtype, r.device))
        transition, added, dstates = (layout.matrices() for _ in range(3))
        decay, dinitial_state = layout.decay(), layout.state()
        stages.chunk_backward(r, w, a, b, segment_ids, inverse, dy, transition, added, decay)
        stages.state_backward(transition, added, decay, dlast_state, dstates, dinitial_state)
        grads = [torch.empty_like(r) for _ in range(6)]
        kept = (segment_ids, inverse, states, last_state)
        stages.gradients(r, w, k, v, a, b, *kept, dstates, dy, *grads)
        return *grads, dinitial_state

    def fake(  # type: ignore[no-untyped-def]
        r, w, k, v, a, b, segment_ids, states, last_state, inverse, dy, dlast_state
    ):
        layout = _Layout(r, stages.chunk_length(r.dtype, r.device))
        return *(r.new_empty(r.shape) for _ in range(6)), layout.state()

    _library.impl(f"wkv7_{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(operator, fake, lib=_library)
    return backward, getattr(torch.ops.rwkv_peft, f"wkv7_{name}_backward").default
