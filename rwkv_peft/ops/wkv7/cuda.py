"""WKV-7 through CUDA kernels of our own, for NVIDIA GPUs from Ampere on.

Two forms give the same results and keep the same for the backward pass. The chunk-parallel form
launches the stages of `stages`, most of them parallel over chunks. The persistent form is one
launch a direction (bf16, chunks of 64): a block goes through all chunks of a head in order, which
is faster where heads fill the GPU. `uses_persistent` chooses by measured costs.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, empty_like

from rwkv_peft.ops.cuda.launch import (
    Kernels,
    LaunchPlan,
    Length,
    Load,
    N,
    align,
    blocks_per_multiprocessor,
    locate,
    max_shared_bytes,
    num_multiprocessors,
    prepare_per_shape,
    row_bytes,
)
from rwkv_peft.ops.staged import Function
from rwkv_peft.ops.wkv7.stages import declare

_FORWARD = Path(__file__).parent / "kernels" / "forward.cu"
_BACKWARD = _FORWARD.with_name("backward.cu")
_PERSISTENT_FORWARD = _FORWARD.with_name("persistent_forward.cu")
_PERSISTENT_BACKWARD = _FORWARD.with_name("persistent_backward.cu")


def shared_bytes(name: str, dtype: torch.dtype, C: int) -> int:
    """Bytes of shared memory of a kernel's block; the layouts are the `...Memory` of its source."""
    row, warps, vector = row_bytes(dtype), C // 8, N * 4
    tile, matrix, vectors = C * row, N * row, (2 * warps + 2) * vector + 16
    forward = 7 * tile + C * 17 * 4 + vectors
    gradients = 9 * tile + 2 * matrix + (C + 1) * (N + 8) * 4 + vectors
    return {
        "wkv7_chunk_forward": forward,
        "wkv7_output": 0,
        "wkv7_persistent_forward": -(-forward // 1024) * 1024 + matrix + N * vector + 3 * tile,
        "wkv7_chunk_backward": 5 * tile + vectors,
        "wkv7_gradients": gradients + warps // 4 * vector,
        "wkv7_persistent_backward": gradients + warps * vector,
    }[name]


KERNELS = Kernels(
    {
        "wkv7_chunk_forward": (_FORWARD, "13P3i"),
        "wkv7_output": (_FORWARD, "3P3i"),
        "wkv7_persistent_forward": (_PERSISTENT_FORWARD, "12P3i"),
        "wkv7_chunk_backward": (_BACKWARD, "10P3i"),
        "wkv7_gradients": (_BACKWARD, "18P3i"),
        "wkv7_persistent_backward": (_PERSISTENT_BACKWARD, "19P3i"),
    },
    shared_bytes,
    largest="wkv7_gradients",
    bf16_only=(_PERSISTENT_FORWARD, _PERSISTENT_BACKWARD),
)
BUILDS = KERNELS.builds()
objection = KERNELS.objection


# time of the persistent form with so many blocks on each multiprocessor, in units of the time that
# the chunk-parallel form takes for one head on each: benchmarks/results/ops_h200_2026-11-26.md
PERSISTENT_COSTS = {1: 0.94, 2: 1.4}


def uses_persistent(plan: LaunchPlan) -> bool:
    """Whether the persistent form is faster for a plan's inputs than the chunk-parallel one."""
    if (plan.dtype, plan.C, plan.device.type) != (torch.bfloat16, 64, "cuda"):
        return False
    nbytes = shared_bytes("wkv7_persistent_forward", plan.dtype, plan.C)
    at_once = min(blocks_per_multiprocessor(nbytes, plan.device), max(PERSISTENT_COSTS))
    if at_once == 0 or nbytes > max_shared_bytes(plan.device):
        return False
    load = plan.heads / num_multiprocessors(plan.device)
    turns, rest = divmod(math.ceil(load), at_once)
    return turns * PERSISTENT_COSTS[at_once] + (PERSISTENT_COSTS[rest] if rest else 0) <= load


class _ChunkParallelForward:
    """The forward pass in the launches of `stages`."""

    def __init__(self, plan: LaunchPlan) -> None:
        own = plan.layout
        self._state, self._matrices = plan.template(own.state), plan.template(own.matrices)
        self._inverse, self._nothing = plan.template(own.inverse), plan.template(own.nothing)
        self._scratch = plan.scratch(own.matrices, own.readout, own.vectors)
        self._chunk_forward = plan.over_chunks("wkv7_chunk_forward", 4)
        self._state_forward = plan.over_states(reverse=False)
        self._output = plan.over_chunks("wkv7_output", 2)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, initial_state, segment_ids, keep
    ) -> tuple[Tensor, ...]:
        inputs, inputs_at = align(r, w, k, v, a, b)
        initial_state, first_at = locate(initial_state)
        segment_ids, segments_at = locate(segment_ids)
        y, last_state = empty_like(inputs[0]), empty_like(self._state)
        states = empty_like(self._matrices)
        inverse, inverse_at = locate(empty_like(self._inverse) if keep else None)
        _scratch, (transition, readout, decay) = self._scratch()
        # what the chunks add lies where the states will
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


class _PersistentForward:
    """The forward pass in one launch, with a block for each head of each row."""

    def __init__(self, plan: LaunchPlan) -> None:
        own = plan.layout
        self._state, self._matrices = plan.template(own.state), plan.template(own.matrices)
        self._inverse, self._nothing = plan.template(own.inverse), plan.template(own.nothing)
        self._kernel = plan.over_heads("wkv7_persistent_forward", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, initial_state, segment_ids, keep
    ) -> tuple[Tensor, ...]:
        inputs, inputs_at = align(r, w, k, v, a, b)
        initial_state, first_at = locate(initial_state)
        segment_ids, segments_at = locate(segment_ids)
        y, last_state = empty_like(inputs[0]), empty_like(self._state)
        states, inverse = (
            empty_like(x if keep else self._nothing) for x in (self._matrices, self._inverse)
        )
        kept_at = (states.data_ptr(), inverse.data_ptr()) if keep else (0, 0)
        self._kernel(
            *(*inputs_at, segments_at, first_at, y.data_ptr(), *kept_at, last_state.data_ptr())
        )
        return y, last_state, states, inverse


class _ChunkParallelBackward:
    """The backward pass in the launches of `stages`."""

    def __init__(self, plan: LaunchPlan) -> None:
        own = plan.layout
        self._state, self._matrices = plan.template(own.state), plan.template(own.matrices)
        self._scratch = plan.scratch(own.matrices, own.vectors)
        self._chunk_backward = plan.over_chunks("wkv7_chunk_backward", 4)
        self._state_backward = plan.over_states(reverse=True)
        self._gradients = plan.over_chunks("wkv7_gradients", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, segment_ids, last_state, states, inverse, dy, dlast_state
    ) -> tuple[Tensor, ...]:
        tensors, (*inputs_at, dy_at) = align(r, w, k, v, a, b, dy)
        r_at, w_at, _, _, a_at, b_at = inputs_at
        segment_ids, segments_at = locate(segment_ids)
        dlast_state, first_at = locate(dlast_state)
        dstates, dinitial_state = empty_like(self._matrices), empty_like(self._state)
        scratch, (transition, decay) = self._scratch()
        # what the chunks add lies where the states' gradients will
        dstates_at, inverse_at = dstates.data_ptr(), inverse.data_ptr()
        self._chunk_backward(
            *(r_at, w_at, a_at, b_at, segments_at, inverse_at, dy_at),
            *(transition, dstates_at, decay),
        )
        last_at = dinitial_state.data_ptr()
        self._state_backward(transition, dstates_at, decay, first_at, dstates_at, last_at)
        # kernels that are queued from here on may reuse its memory
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


class _PersistentBackward:
    """The backward pass in one launch, with a block for each head of each row."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._state = plan.template(plan.layout.state)
        self._kernel = plan.over_heads("wkv7_persistent_backward", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, segment_ids, last_state, states, inverse, dy, dlast_state
    ) -> tuple[Tensor, ...]:
        tensors, (*inputs_at, dy_at) = align(r, w, k, v, a, b, dy)
        segment_ids, segments_at = locate(segment_ids)
        dlast_state, dlast_at = locate(dlast_state)
        dinitial_state = empty_like(self._state)
        grads = [*map(empty_like, tensors[:6])]
        kept_at = (inverse.data_ptr(), states.data_ptr(), last_state.data_ptr())
        grads_at = map(Tensor.data_ptr, (*grads, dinitial_state))
        self._kernel(*inputs_at, segments_at, *kept_at, dlast_at, dy_at, *grads_at)
        return *grads, dinitial_state


def operator(
    name: str,
    load: Load,
    length: Length,
    is_persistent: Callable[[LaunchPlan], bool] = uses_persistent,
) -> Function:
    """The operator `wkv7_{name}` by the kernels that `load` brings, in chunks of `length`.

    Args:
        is_persistent: whether a plan is for the persistent form.
    """

    def choose(persistent: type, parallel: type) -> Callable[..., Any]:
        return prepare_per_shape(
            lambda plan: (persistent if is_persistent(plan) else parallel)(plan), load, length
        )

    forward = choose(_PersistentForward, _ChunkParallelForward)
    backward = choose(_PersistentBackward, _ChunkParallelBackward)
    return declare(name, length, forward, backward)


wkv7_cuda = operator("cuda", KERNELS.load, KERNELS.chunk_length)
