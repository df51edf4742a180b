"""WKV-7 through CUDA kernels of our own, for NVIDIA GPUs from Ampere on.

Two forms give the same results and keep the same for the backward pass: the stages of `stages`,
parallel over time, and one launch a direction in which a block walks through the chunks of a head,
faster where heads are many.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, empty_like

from rwkv_peft.ops.cuda.launch import (
    Kernels,
    Length,
    Load,
    N,
    Starts,
    device_bytes,
    located,
    multiprocessors,
    per_shape,
    readable,
    resident,
    row_bytes,
)
from rwkv_peft.ops.staged import Function
from rwkv_peft.ops.wkv7.stages import declare

_FORWARD = Path(__file__).parent / "kernels" / "forward.cu"
_BACKWARD = _FORWARD.with_name("backward.cu")
_WALK_FORWARD = _FORWARD.with_name("walk_forward.cu")
_WALK_BACKWARD = _FORWARD.with_name("walk_backward.cu")


def shared_bytes(name: str, dtype: torch.dtype, C: int) -> int:
    """Shared memory of a block of a kernel; the layouts are the `...Memory` of its source."""
    row, warps, vector = row_bytes(dtype), C // 8, N * 4
    tile, matrix, vectors = C * row, N * row, (2 * warps + 2) * vector + 16
    forward = 7 * tile + C * 17 * 4 + vectors
    gradients = 9 * tile + 2 * matrix + (C + 1) * (N + 8) * 4 + vectors
    return {
        "wkv7_chunk_forward": forward,
        "wkv7_output": 0,
        "wkv7_walk_forward": -(-forward // 1024) * 1024 + matrix + N * vector + 3 * tile,
        "wkv7_chunk_backward": 5 * tile + vectors,
        "wkv7_gradients": gradients + warps // 4 * vector,
        "wkv7_walk_backward": gradients + warps * vector,
    }[name]


KERNELS = Kernels(
    {
        "wkv7_chunk_forward": (_FORWARD, "13P3i"),
        "wkv7_output": (_FORWARD, "3P3i"),
        "wkv7_walk_forward": (_WALK_FORWARD, "12P3i"),
        "wkv7_chunk_backward": (_BACKWARD, "10P3i"),
        "wkv7_gradients": (_BACKWARD, "18P3i"),
        "wkv7_walk_backward": (_WALK_BACKWARD, "19P3i"),
    },
    shared_bytes,
    largest="wkv7_gradients",
    narrow=(_WALK_FORWARD, _WALK_BACKWARD),
)
BUILDS = KERNELS.builds()
objection = KERNELS.objection


# What so many walking blocks on each multiprocessor take, in times of the stages for one head on
# each: on an H200, see benchmarks/results/ops_h200_2026-11-26.md
WALK_COSTS = {1: 0.94, 2: 1.4}


def is_walked(starts: Starts) -> bool:
    """Whether one launch, a block for each head, is faster than the stages."""
    if (starts.dtype, starts.C, starts.device.type) != (torch.bfloat16, 64, "cuda"):
        return False
    nbytes = shared_bytes("wkv7_walk_forward", starts.dtype, starts.C)
    at_once = min(resident(nbytes, starts.device), max(WALK_COSTS))
    if at_once == 0 or nbytes > device_bytes(starts.device):
        return False
    load = starts.heads / multiprocessors(starts.device)
    turns, rest = divmod(math.ceil(load), at_once)
    return turns * WALK_COSTS[at_once] + (WALK_COSTS[rest] if rest else 0) <= load


class _Forward:
    """The stages of the forward pass; see `stages`."""

    def __init__(self, starts: Starts) -> None:
        own = starts.layout
        self._state, self._matrices = starts.like(own.state), starts.like(own.matrices)
        self._inverse, self._nothing = starts.like(own.inverse), starts.like(own.nothing)
        self._scratch = starts.scratch(own.matrices, own.readout, own.vectors)
        self._chunk_forward = starts.over_chunks("wkv7_chunk_forward", 4)
        self._state_forward = starts.over_states(reverse=False)
        self._output = starts.over_chunks("wkv7_output", 2)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, initial_state, segment_ids, keep
    ) -> tuple[Tensor, ...]:
        inputs, inputs_at = readable(r, w, k, v, a, b)
        initial_state, first_at = located(initial_state)
        segment_ids, segments_at = located(segment_ids)
        y, last_state = empty_like(inputs[0]), empty_like(self._state)
        states = empty_like(self._matrices)
        inverse, inverse_at = located(empty_like(self._inverse) if keep else None)
        _scratch, (transition, readout, decay) = self._scratch()
        # what the chunks add is in the place of the states
        y_at, states_at = y.data_ptr(), states.data_ptr()
        self._chunk_forward(
            *inputs_at,
            segments_at,
            y_at,
            transition,
            states_at,
            decay,
            readout,
            inverse_at,
        )
        last_at = last_state.data_ptr()
        self._state_forward(transition, states_at, decay, first_at, states_at, last_at)
        self._output(readout, states_at, y_at)
        if inverse is None:
            return y, last_state, empty_like(self._nothing), empty_like(self._nothing)
        return y, last_state, states, inverse


class _WalkForward:
    """The same in one launch, a block for each head of each row."""

    def __init__(self, starts: Starts) -> None:
        own = starts.layout
        self._state, self._matrices = starts.like(own.state), starts.like(own.matrices)
        self._inverse, self._nothing = starts.like(own.inverse), starts.like(own.nothing)
        self._walk = starts.over_heads("wkv7_walk_forward", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, initial_state, segment_ids, keep
    ) -> tuple[Tensor, ...]:
        inputs, inputs_at = readable(r, w, k, v, a, b)
        initial_state, first_at = located(initial_state)
        segment_ids, segments_at = located(segment_ids)
        y, last_state = empty_like(inputs[0]), empty_like(self._state)
        states, inverse = (
            empty_like(x if keep else self._nothing) for x in (self._matrices, self._inverse)
        )
        kept_at = (states.data_ptr(), inverse.data_ptr()) if keep else (0, 0)
        self._walk(
            *(*inputs_at, segments_at, first_at, y.data_ptr(), *kept_at, last_state.data_ptr())
        )
        return y, last_state, states, inverse


class _Backward:
    """The stages of the backward pass; see `stages`."""

    def __init__(self, starts: Starts) -> None:
        own = starts.layout
        self._state, self._matrices = starts.like(own.state), starts.like(own.matrices)
        self._scratch = starts.scratch(own.matrices, own.vectors)
        self._chunk_backward = starts.over_chunks("wkv7_chunk_backward", 4)
        self._state_backward = starts.over_states(reverse=True)
        self._gradients = starts.over_chunks("wkv7_gradients", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, segment_ids, last_state, states, inverse, dy, dlast_state
    ) -> tuple[Tensor, ...]:
        tensors, (*inputs_at, dy_at) = readable(r, w, k, v, a, b, dy)
        r_at, w_at, _, _, a_at, b_at = inputs_at
        segment_ids, segments_at = located(segment_ids)
        dlast_state, first_at = located(dlast_state)
        dstates, dinitial_state = empty_like(self._matrices), empty_like(self._state)
        scratch, (transition, decay) = self._scratch()
        # what the chunks add is in the place of the states' gradients
        dstates_at, inverse_at = dstates.data_ptr(), inverse.data_ptr()
        self._chunk_backward(
            *(r_at, w_at, a_at, b_at, segments_at, inverse_at, dy_at),
            *(transition, dstates_at, decay),
        )
        last_at = dinitial_state.data_ptr()
        self._state_backward(transition, dstates_at, decay, first_at, dstates_at, last_at)
        # kernels queued from here on may have its memory
        del scratch
        grads = [*map(empty_like, tensors[:6])]
        self._gradients(
            *inputs_at,
            segments_at,
            inverse_at,
            states.data_ptr(),
            last_state.data_ptr(),
            dstates_at,
            dy_at,
            *map(Tensor.data_ptr, grads),
        )
        return *grads, dinitial_state


class _WalkBackward:
    """The same in one launch, a block for each head of each row."""

    def __init__(self, starts: Starts) -> None:
        self._state = starts.like(starts.layout.state)
        self._walk = starts.over_heads("wkv7_walk_backward", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, segment_ids, last_state, states, inverse, dy, dlast_state
    ) -> tuple[Tensor, ...]:
        tensors, (*inputs_at, dy_at) = readable(r, w, k, v, a, b, dy)
        segment_ids, segments_at = located(segment_ids)
        dlast_state, dlast_at = located(dlast_state)
        dinitial_state = empty_like(self._state)
        grads = [*map(empty_like, tensors[:6])]
        kept_at = (inverse.data_ptr(), states.data_ptr(), last_state.data_ptr())
        grads_at = map(Tensor.data_ptr, (*grads, dinitial_state))
        self._walk(*inputs_at, segments_at, *kept_at, dlast_at, dy_at, *grads_at)
        return *grads, dinitial_state


def operator(
    name: str, load: Load, length: Length, walks: Callable[[Starts], bool] = is_walked
) -> Function:
    """The operator `wkv7_{name}` by the kernels that `load` brings, in chunks of `length`.

    Args:
        walks: whether a block goes through all chunks of a head, in place of the stages.
    """

    def choose(walk: type, stages: type) -> Callable[..., Any]:
        return per_shape(lambda starts: (walk if walks(starts) else stages)(starts), load, length)

    forward, backward = choose(_WalkForward, _Forward), choose(_WalkBackward, _Backward)
    return declare(name, length, forward, backward)


wkv7_cuda = operator("cuda", KERNELS.load, KERNELS.chunk_length)
