"""WKV-7 through CUDA kernels of our own, for NVIDIA GPUs from Ampere on."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.ops.cuda import availability
from rwkv_peft.ops.cuda.launch import (
    SCAN,
    SCAN_SIGNATURE,
    Load,
    N,
    address,
    aligned,
    builds,
    device_bytes,
    loader,
    row_bytes,
    scan_bytes,
    start_scan,
)
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.wkv7.stages import Stages, register

_FORWARD = Path(__file__).parent / "kernels" / "forward.cu"
_BACKWARD = _FORWARD.with_name("backward.cu")
# of each kernel the source and the signature, as `driver.load_kernel` wants them
KERNELS = {
    "wkv7_chunk_forward": (_FORWARD, "13P3i"),
    "wkv7_output": (_FORWARD, "3P3i"),
    "wkv7_chunk_backward": (_BACKWARD, "10P3i"),
    "wkv7_gradients": (_BACKWARD, "18P3i"),
    "scan": (SCAN, SCAN_SIGNATURE),
}
BUILDS = builds(_FORWARD, _BACKWARD)


def shared_bytes(name: str, dtype: torch.dtype, C: int) -> int:
    """Shared memory of a block of a kernel; the layouts are the `...Memory` of its source."""
    if name == "scan":
        return scan_bytes(dtype, C)
    row, warps, vector = row_bytes(dtype), C // 8, N * 4
    tiles, others = {
        "wkv7_chunk_forward": (7, C // 16 * 16 * 17 * 4),
        "wkv7_output": (0, 0),
        "wkv7_chunk_backward": (5, 0),
        "wkv7_gradients": (9, 2 * N * row + (C + 1) * (N + 8) * 4 + warps // 4 * vector),
    }[name]
    vectors = (2 * warps + 2) * vector + 16
    return tiles * C * row + others + vectors if tiles else 0


def chunk_length(dtype: torch.dtype, device: torch.device) -> int:
    """64 tokens in bf16 where the GPU has the shared memory for it, else 32."""
    if dtype != torch.bfloat16:
        return 32
    return 64 if device_bytes(device) >= shared_bytes("wkv7_gradients", dtype, 64) else 32


def objection(request: Request) -> str | None:
    """Why the kernels cannot serve a request; None if they can."""
    return availability.objection(request) or availability.memory_objection(
        request, shared_bytes("wkv7_gradients", request.dtype, 32)
    )


_load = loader(KERNELS, shared_bytes)


def stages(
    load: Load = _load,
    length: Callable[[torch.dtype, torch.device], int] = chunk_length,
) -> Stages:
    """The stages as launches of the kernels that `load` brings, in chunks of `length`."""

    def start(name: str, threads: int, like: Tensor, *tensors: Tensor | None) -> None:
        B, T, H, _ = like.shape
        C = length(like.dtype, like.device)
        M = (T + C - 1) // C
        kernel = load(name, like.dtype, C, like.device)
        kernel((M, B * H, 1), threads * C, *map(address, tensors), T, H, M)

    def chunk_forward(r, w, k, v, a, b, *rest):  # type: ignore[no-untyped-def]
        start("wkv7_chunk_forward", 4, r, *aligned(r, w, k, v, a, b), *rest)

    def output(readout, states, y):  # type: ignore[no-untyped-def]
        start("wkv7_output", 2, y, readout, states, y)

    def chunk_backward(r, w, a, b, segment_ids, inverse, dy, *rest):  # type: ignore[no-untyped-def]
        r, w, a, b, dy = aligned(r, w, a, b, dy)
        start("wkv7_chunk_backward", 4, r, r, w, a, b, segment_ids, inverse, dy, *rest)

    def gradients(r, w, k, v, a, b, segment_ids, inverse, states, last_state, dstates, dy, *grads):  # type: ignore[no-untyped-def]
        *inputs, dy = aligned(r, w, k, v, a, b, dy)
        scratch = (inverse, states, last_state, dstates)
        start("wkv7_gradients", 4, r, *inputs, segment_ids, *scratch, dy, *grads)

    return Stages(
        chunk_length=length,
        chunk_forward=chunk_forward,
        state_forward=lambda *tensors: start_scan(load, *tensors, reverse=False),
        output=output,
        chunk_backward=chunk_backward,
        state_backward=lambda *tensors: start_scan(load, *tensors, reverse=True),
        gradients=gradients,
    )


wkv7_cuda = register("cuda", stages())
