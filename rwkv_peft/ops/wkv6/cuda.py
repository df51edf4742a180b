"""WKV-6 through CUDA kernels of our own, for NVIDIA GPUs from Ampere on."""

from pathlib import Path

import torch
from torch import Tensor, empty_like

from rwkv_peft.ops.cuda.launch import (
    Kernels,
    LaunchPlan,
    Length,
    Load,
    N,
    align,
    locate,
    prepare_per_shape,
    row_bytes,
)
from rwkv_peft.ops.staged import Function, Memory
from rwkv_peft.ops.wkv6.stages import declare

_FORWARD = Path(__file__).parent / "kernels" / "forward.cu"
_BACKWARD = _FORWARD.with_name("backward.cu")


def shared_bytes(name: str, dtype: torch.dtype, C: int) -> int:
    """Bytes of shared memory of a kernel's block; the layouts are the `...Memory` of its source."""
    row = row_bytes(dtype)
    tile, vector, warps, levels = C * row, N * 4, C // 8, C.bit_length() - 1
    tiles, parts = {
        "wkv6_chunk": (2, 0),
        "wkv6_output": (levels + 2, 64 * C * 4),
        "wkv6_gradients": (levels + 5, 2 * N * row + (2 * warps + warps // 4) * vector),
    }[name]
    return tiles * tile + parts + (warps + 1) * vector + 2 * C * 4 + 16


KERNELS = Kernels(
    {
        "wkv6_chunk": (_FORWARD, "6P4i"),
        "wkv6_output": (_FORWARD, "8P3i"),
        "wkv6_gradients": (_BACKWARD, "14P3i"),
    },
    shared_bytes,
    largest="wkv6_gradients",
)
BUILDS = KERNELS.builds()
objection = KERNELS.objection


class _Forward:
    """The forward pass in the launches of `stages`."""

    def __init__(self, plan: LaunchPlan) -> None:
        own = plan.layout
        self._state, self._matrices = plan.template(own.state), plan.template(own.matrices)
        self._vectors, self._nothing = plan.template(own.vectors), plan.template(own.nothing)
        self._wide_u = plan.template(Memory(own.vectors.shape[1::2], torch.float32))
        self._chunk = plan.over_chunks("wkv6_chunk", 4, False)
        self._over_states = plan.over_states(reverse=False)
        self._output = plan.over_chunks("wkv6_output", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, u, initial_state, segment_ids, keep
    ) -> tuple[Tensor, ...]:
        inputs, (r_at, w_at, k_at, v_at) = align(r, w, k, v)
        # a copy of a float32 u too: a result of an operator must not be one of its inputs
        wide_u = empty_like(self._wide_u).copy_(u)
        initial_state, first_at = locate(initial_state)
        segment_ids, segments_at = locate(segment_ids)
        y, last_state = empty_like(inputs[0]), empty_like(self._state)
        states, decay = empty_like(self._matrices), empty_like(self._vectors)
        # what the chunks add lies where the states will
        states_at, decay_at = states.data_ptr(), decay.data_ptr()
        self._chunk(w_at, k_at, v_at, segments_at, states_at, decay_at)
        self._over_states(0, states_at, decay_at, first_at, states_at, last_state.data_ptr())
        given = (wide_u.data_ptr(), segments_at, states_at)
        self._output(r_at, w_at, k_at, v_at, *given, y.data_ptr())
        return y, last_state, states if keep else empty_like(self._nothing), wide_u


class _Backward:
    """The backward pass in the launches of `stages`."""

    def __init__(self, plan: LaunchPlan) -> None:
        own = plan.layout
        self._state, self._vectors = plan.template(own.state), plan.template(own.vectors)
        self._scratch = plan.scratch(own.matrices, own.vectors)
        self._chunk = plan.over_chunks("wkv6_chunk", 4, True)
        self._over_states = plan.over_states(reverse=True)
        self._gradients = plan.over_chunks("wkv6_gradients", 4)

    def run(  # type: ignore[no-untyped-def]
        self, r, w, k, v, u, segment_ids, states, wide_u, dy, dlast_state
    ) -> tuple[Tensor, ...]:
        inputs, (r_at, w_at, k_at, v_at, dy_at) = align(r, w, k, v, dy)
        dlast_state, first_at = locate(dlast_state)
        segment_ids, segments_at = locate(segment_ids)
        dinitial_state, du = empty_like(self._state), empty_like(self._vectors)
        # what the chunks add lies where the states' gradients will
        _scratch, (dstates_at, decay_at) = self._scratch()
        self._chunk(w_at, r_at, dy_at, segments_at, dstates_at, decay_at)
        last_at = dinitial_state.data_ptr()
        self._over_states(0, dstates_at, decay_at, first_at, dstates_at, last_at)
        grads = [*map(empty_like, inputs[:4])]
        self._gradients(
            *(r_at, w_at, k_at, v_at, dy_at, wide_u.data_ptr(), segments_at),
            *(states.data_ptr(), dstates_at),
            *map(Tensor.data_ptr, grads),
            du.data_ptr(),
        )
        return *grads, du.sum((0, 2)).to(u.dtype), dinitial_state


def operator(name: str, load: Load, length: Length) -> Function:
    """The operator `wkv6_{name}` by the kernels that `load` brings, in chunks of `length`."""
    forward, backward = (prepare_per_shape(x, load, length) for x in (_Forward, _Backward))
    return declare(name, length, forward, backward)


wkv6_cuda = operator("cuda", KERNELS.load, KERNELS.chunk_length)
