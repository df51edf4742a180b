"""WKV-6 through CUDA kernels of our own, for NVIDIA GPUs from Ampere on."""

from collections.abc import Callable, Sequence
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
from rwkv_peft.ops.wkv6.stages import Stages, register

_FORWARD = Path(__file__).parent / "kernels" / "forward.cu"
_BACKWARD = _FORWARD.with_name("backward.cu")
# of each kernel the source and the signature, as `driver.load_kernel` wants them
KERNELS = {
    "wkv6_chunk": (_FORWARD, "6P4i"),
    "wkv6_output": (_FORWARD, "8P3i"),
    "wkv6_gradients": (_BACKWARD, "14P3i"),
    "scan": (SCAN, SCAN_SIGNATURE),
}
BUILDS = builds(_FORWARD, _BACKWARD)


def shared_bytes(name: str, dtype: torch.dtype, C: int) -> int:
    """Shared memory of a block of a kernel; the layouts are the `...Memory` of its source."""
    if name == "scan":
        return scan_bytes(dtype, C)
    row = row_bytes(dtype)
    tile, vector, warps, levels = C * row, N * 4, C // 8, C.bit_length() - 1
    tiles, parts = {
        "wkv6_chunk": (2, 0),
        "wkv6_output": (levels + 2, 64 * C * 4),
        "wkv6_gradients": (levels + 5, 2 * N * row + (2 * warps + warps // 4) * vector),
    }[name]
    return tiles * tile + parts + (warps + 1) * vector + 2 * C * 4 + 16


def chunk_length(dtype: torch.dtype, device: torch.device) -> int:
    """64 tokens in bf16 where the GPU has the shared memory for it, else 32."""
    if dtype != torch.bfloat16:
        return 32
    return 64 if device_bytes(device) >= shared_bytes("wkv6_gradients", dtype, 64) else 32


def objection(request: Request) -> str | None:
    """Why the kernels cannot serve a request; None if they can."""
    return availability.objection(request) or availability.memory_objection(
        request, shared_bytes("wkv6_gradients", request.dtype, 32)
    )


_load = loader(KERNELS, shared_bytes)


def stages(
    load: Load = _load,
    length: Callable[[torch.dtype, torch.device], int] = chunk_length,
) -> Stages:
    """The stages as launches of the kernels that `load` brings, in chunks of `length`."""

    def start(name: str, tensors: Sequence[Tensor | None], *last: int) -> None:
        like = tensors[0]
        assert like is not None
        B, T, H, _ = like.shape
        C = length(like.dtype, like.device)
        M = (T + C - 1) // C
        kernel = load(name, like.dtype, C, like.device)
        kernel((M, B * H, 1), 4 * C, *map(address, tensors), T, H, M, *last)

    def chunk(w, keys, values, segment_ids, reverse, added, decay):  # type: ignore[no-untyped-def]
        tensors = (*aligned(w, keys, values), segment_ids, added, decay)
        start("wkv6_chunk", tensors, int(reverse))

    def state(added, decay, first, reverse, states, last):  # type: ignore[no-untyped-def]
        start_scan(load, None, added, decay, first, states, last, reverse=reverse)

    def output(r, w, k, v, u, segment_ids, states, y):  # type: ignore[no-untyped-def]
        start("wkv6_output", (*aligned(r, w, k, v), u, segment_ids, states, y))

    def gradients(r, w, k, v, u, segment_ids, states, dstates, dy, *grads):  # type: ignore[no-untyped-def]
        inputs = aligned(r, w, k, v, dy)
        start("wkv6_gradients", (*inputs, u, segment_ids, states, dstates, *grads))

    return Stages(length, chunk, state, output, gradients)


wkv6_cuda = register("cuda", stages())
