"""WKV-6 on a GPU in stages over chunks of time, all but one of them parallel over the chunks.

A chunk of C tokens scales the columns of the state and adds to it, S_1 = S_0 diag(decay) + P, which
comes from the chunk alone. The gradient of the state goes the same way in reverse, with r and dy in
place of k and v, so that two stages serve both directions:

    forward   chunk (all chunks) -> state (in order)  -> output (all chunks)
    backward  chunk              -> state (reversed)  -> gradients (all chunks)

With g_t the sum of log decays of a chunk up to token t and G that of all, P is v^T (k e^{G - g_i}),
and what is added to the gradient of the entering state is dy^T (r e^{g_{t-1}}). The formulas of the
other two stages are in `chunked`. A backend brings the stages; memory, order, what is kept for the
backward pass are the same for all and are here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.ops import staged
from rwkv_peft.ops.staged import Function, Part, contiguous, make_layout

# of the two registered functions, as `torch.library` has it
FORWARD = (
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? initial_state, "
    "Tensor? segment_ids, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? segment_ids, Tensor states, "
    "Tensor wide_u, Tensor dy, Tensor? dlast_state) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


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


def register(name: str, stages: Stages) -> Function:
    """The operator `wkv6_{name}` of a backend, called like `wkv6_reference`."""
    return declare(name, stages.chunk_length, _forward(stages), _backward(stages))


def declare(
    name: str,
    chunk_length: Callable[[torch.dtype, torch.device], int],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
) -> Function:
    """The operator `wkv6_{name}` of a forward and a backward function.

    Kept for the backward pass are the inputs, the states that enter the chunks and u in
    float32.

    Args:
        forward: see FORWARD; gives y, the last state, the states, these as `Layout.nothing` if
            nothing is to be kept, and u in float32.
        backward: see BACKWARD; gives the gradients of the inputs and of the initial state.
    """

    def fake_forward(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, *others: Tensor | bool | None
    ) -> tuple[Tensor, ...]:
        *_, keep = others
        own = make_layout(r.shape, r.dtype, chunk_length(r.dtype, r.device))
        states = own.matrices if keep else own.nothing
        wide_u = u.new_empty(u.shape, dtype=torch.float32)
        return r.new_empty(r.shape), own.state.allocate(r), states.allocate(r), wide_u

    def fake_backward(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        state = make_layout(r.shape, r.dtype, chunk_length(r.dtype, r.device)).state
        grads = (r.new_empty(r.shape) for _ in range(4))
        return *grads, u.new_empty(u.shape), state.allocate(r)

    return staged.register(
        f"wkv6_{name}",
        Part(FORWARD, forward, fake_forward),
        Part(BACKWARD, backward, fake_backward),
        kept=2,
    )


def _forward(stages: Stages) -> Callable[..., tuple[Tensor, ...]]:
    def forward(r, w, k, v, u, initial_state, segment_ids, keep):  # type: ignore[no-untyped-def]
        r, w, k, v = (x.contiguous() for x in (r, w, k, v))
        segment_ids = contiguous(segment_ids)
        initial_state = None if initial_state is None else initial_state.float().contiguous()
        own = make_layout(r.shape, r.dtype, stages.chunk_length(r.dtype, r.device))
        added, decay, states = (x.allocate(r) for x in (own.matrices, own.vectors, own.matrices))
        y, last_state = torch.empty_like(r), own.state.allocate(r)
        stages.chunk(w, k, v, segment_ids, False, added, decay)
        stages.state(added, decay, initial_state, False, states, last_state)
        # a copy of a float32 u too: a result of an operator must not be one of its inputs
        wide_u = torch.empty(u.shape, dtype=torch.float32, device=u.device).copy_(u)
        stages.output(r, w, k, v, wide_u, segment_ids, states, y)
        return y, last_state, states if keep else own.nothing.allocate(r), wide_u

    return forward


def _backward(stages: Stages) -> Callable[..., tuple[Tensor, ...]]:
    def backward(  # type: ignore[no-untyped-def]
        r, w, k, v, u, segment_ids, states, wide_u, dy, dlast_state
    ):
        r, w, k, v, dy = (x.contiguous() for x in (r, w, k, v, dy))
        segment_ids, dlast_state = contiguous(segment_ids), contiguous(dlast_state)
        own = make_layout(r.shape, r.dtype, stages.chunk_length(r.dtype, r.device))
        added, decay, dstates = (x.allocate(r) for x in (own.matrices, own.vectors, own.matrices))
        dinitial_state, du = own.state.allocate(r), own.vectors.allocate(r)
        stages.chunk(w, r, dy, segment_ids, True, added, decay)
        stages.state(added, decay, dlast_state, True, dstates, dinitial_state)
        grads = [torch.empty_like(r) for _ in range(4)]
        stages.gradients(r, w, k, v, wide_u, segment_ids, states, dstates, dy, *grads, du)
        return *grads, du.sum((0, 2)).to(u.dtype), dinitial_state

    return backward
