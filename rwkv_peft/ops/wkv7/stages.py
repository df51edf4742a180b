"""WKV-7 on a GPU in six stages over chunks of time, four of them parallel over all chunks.

A chunk of C tokens changes the state by one affine map, S_1 = S_0 (diag(decay) + X) + P. X, the
transition, is what the tokens' a and b do to the entering state; P, added, is what the chunk writes
by itself. Both come from the chunk alone, so that only this one product a chunk is sequential:

    forward   chunk_forward (all chunks) -> state_forward (in order)  -> output (all chunks)
    backward  chunk_backward             -> state_backward (reversed) -> gradients

In a chunk with the log decays l, let g_t be their sum up to token t, G that of all, and m =
g_{C/2-1}, the middle. All exponents are measured from the middle: decays above 0.545 keep them
within 20 for 64 tokens, which float32 and bfloat16 can hold. With the operands

    at_t = a_t e^{g_{t-1}-m}   rt_t = r_t e^{g_t-m}   bt_i = b_i e^{m-g_i}   kt_i = k_i e^{m-g_i}

and their causal products A_ab, A_ak (i < t), A_rb, A_rk (i <= t), the chunk is, S_0 entering it,

    u = (I - A_ab)^-1 (at S_0' + A_ak v)       S_0' = e^m S_0^T
    y = rt S_0' + A_rb u + A_rk v
    S_1 = (S_0 diag(e^m) + v^T kt + u^T bt) diag(e^{G-m}).

A backend brings the six stages; memory, order and what is kept for the backward pass are the same
for all backends and are here. The CUDA backend also has a second form, a persistent kernel, which
goes through the chunks in order in one launch (`kernels/persistent_forward.cu`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.ops import staged
from rwkv_peft.ops.staged import Function, Part, contiguous, make_layout

# of the two registered functions, as `torch.library` has it
FORWARD = (
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, "
    "Tensor? segment_ids, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? segment_ids, "
    "Tensor last_state, Tensor states, Tensor inverse, Tensor dy, Tensor? dlast_state) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True, slots=True)
class Stages:
    """What a backend brings: a chunk length, and six functions that fill their last tensors.

    Inputs, y, dy and gradients are (B, T, H, N); segment_ids (B, T) int32 or None. With M chunks of
    C tokens, transition, added, states and dstates are (B, H, M, N, N), readout (B, H, M, C, N) and
    inverse (B, H, M, C, C), all as `staged.Layout` has them; decay (B, H, M, N) and single states
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


def register(name: str, stages: Stages) -> Function:
    """The operator `wkv7_{name}` of a backend, called like `wkv7_reference`."""
    return declare(name, stages.chunk_length, _forward(stages), _backward(stages))


def declare(
    name: str,
    chunk_length: Callable[[torch.dtype, torch.device], int],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
) -> Function:
    """The operator `wkv7_{name}` of a forward and a backward function.

    Kept for the backward pass are the inputs, the states that enter the chunks and leave the last,
    and the inverses.

    Args:
        forward: see FORWARD; gives y, the last state, states and inverse, these two as
            `Layout.nothing` if nothing is to be kept.
        backward: see BACKWARD; gives the gradients of the inputs and of the initial state.
    """

    def fake_forward(r: Tensor, *others: Tensor | bool | None) -> tuple[Tensor, ...]:
        *_, keep = others
        own = make_layout(r.shape, r.dtype, chunk_length(r.dtype, r.device))
        kept = (own.matrices, own.inverse) if keep else (own.nothing, own.nothing)
        return r.new_empty(r.shape), *(x.allocate(r) for x in (own.state, *kept))

    def fake_backward(r: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        state = make_layout(r.shape, r.dtype, chunk_length(r.dtype, r.device)).state
        return *(r.new_empty(r.shape) for _ in range(6)), state.allocate(r)

    return staged.register(
        f"wkv7_{name}",
        Part(FORWARD, forward, fake_forward),
        Part(BACKWARD, backward, fake_backward),
        kept=1,
    )


def _forward(stages: Stages) -> Callable[..., tuple[Tensor, ...]]:
    def forward(r, w, k, v, a, b, initial_state, segment_ids, keep):  # type: ignore[no-untyped-def]
        r, w, k, v, a, b = inputs = [x.contiguous() for x in (r, w, k, v, a, b)]
        segment_ids, initial_state = contiguous(segment_ids), contiguous(initial_state)
        own = make_layout(r.shape, r.dtype, stages.chunk_length(r.dtype, r.device))
        y, decay, readout = torch.empty_like(r), own.vectors.allocate(r), own.readout.allocate(r)
        transition, added, states = (own.matrices.allocate(r) for _ in range(3))
        last_state, inverse = own.state.allocate(r), own.inverse.allocate(r) if keep else None
        stages.chunk_forward(*inputs, segment_ids, y, transition, added, decay, readout, inverse)
        stages.state_forward(transition, added, decay, initial_state, states, last_state)
        stages.output(readout, states, y)
        if inverse is None:
            return y, last_state, own.nothing.allocate(r), own.nothing.allocate(r)
        return y, last_state, states, inverse

    return forward


def _backward(stages: Stages) -> Callable[..., tuple[Tensor, ...]]:
    def backward(  # type: ignore[no-untyped-def]
        r, w, k, v, a, b, segment_ids, last_state, states, inverse, dy, dlast_state
    ):
        r, w, k, v, a, b, dy = (x.contiguous() for x in (r, w, k, v, a, b, dy))
        segment_ids, dlast_state = contiguous(segment_ids), contiguous(dlast_state)
        own = make_layout(r.shape, r.dtype, stages.chunk_length(r.dtype, r.device))
        transition, added, dstates = (own.matrices.allocate(r) for _ in range(3))
        decay, dinitial_state = own.vectors.allocate(r), own.state.allocate(r)
        stages.chunk_backward(r, w, a, b, segment_ids, inverse, dy, transition, added, decay)
        stages.state_backward(transition, added, decay, dlast_state, dstates, dinitial_state)
        grads = [torch.empty_like(r) for _ in range(6)]
        kept = (segment_ids, inverse, states, last_state)
        stages.gradients(r, w, k, v, a, b, *kept, dstates, dy, *grads)
        return *grads, dinitial_state

    return backward
