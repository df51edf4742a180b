"""WKV-6 through CUDA kernels of our own, for NVIDIA GPUs from Ampere on."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.ops.cuda import availability
from rwkv_peft.ops.cuda.driver import load_kernel
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.wkv6.stages import Stages, register

Launch = Callable[..., None]

N = 64
_FORWARD = Path(__file__).parent / "kernels" / "forward.cu"
_BACKWARD = _FORWARD.with_name("backward.cu")
_SCAN = Path(__file__).parents[1] / "cuda" / "scan.cu"
# of each kernel the source and the signature, as `driver.load_kernel` wants them
KERNELS = {
    "wkv6_chunk": (_FORWARD, "6P4i"),
    "wkv6_output": (_FORWARD, "8P3i"),
    "wkv6_gradients": (_BACKWARD, "14P3i"),
    "scan": (_SCAN, "6P3i"),
}
_IO = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# chunks that the scan fetches ahead
_DEPTH = {torch.bfloat16: 6, torch.float16: 3, torch.float32: 3}


def options(dtype: torch.dtype, C: int) -> tuple[str, ...]:
    """What the sources are compiled with for inputs of a type and chunks of C tokens."""
    return f"-DIO={_IO[dtype]}", f"-DC={C}"


BUILDS = [
    ((source,), options(dtype, C))
    for source in (_FORWARD, _BACKWARD, _SCAN)
    for dtype, C in [(torch.bfloat16, 64), *((dtype, 32) for dtype in _IO)]
]


def shared_bytes(name: str, dtype: torch.dtype, C: int) -> int:
    """Shared memory of a block of a kernel; the layouts are the `...Memory` of its source."""
    row = N * 2 if dtype == torch.bfloat16 else (N + 8) * 4
    tile, vector, warps, levels = C * row, N * 4, C // 8, C.bit_length() - 1
    if name == "scan":
        size = 2 if dtype == torch.bfloat16 else 4
        return _DEPTH[dtype] * ((N * N + 16 * N) * size + vector)
    tiles, parts = {
        "wkv6_chunk": (2, 0),
        "wkv6_output": (levels + 2, 64 * C * 4),
        "wkv6_gradients": (levels + 5, 2 * N * row + (2 * warps + warps // 4) * vector),
    }[name]
    return tiles * tile + parts + (warps + 1) * vector + 2 * C * 4 + 16


@functools.cache
def _device_bytes(device: torch.device) -> int:
    """What a block on a GPU may have."""
    # PyTorch's stubs do not know the name
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def chunk_length(dtype: torch.dtype, device: torch.device) -> int:
    """64 tokens in bf16 where the GPU has the shared memory for it, else 32."""
    if dtype != torch.bfloat16:
        return 32
    return 64 if _device_bytes(device) >= shared_bytes("wkv6_gradients", dtype, 64) else 32


def objection(request: Request) -> str | None:
    """Why the kernels cannot serve a request; None if they can."""
    said = availability.objection(request)
    if said is not None:
        return said
    wanted = shared_bytes("wkv6_gradients", request.dtype, 32)
    found = _device_bytes(request.device)
    if found < wanted:
        name = str(request.dtype).removeprefix("torch.")
        return f"needs {wanted} bytes of shared memory for {name}, and this GPU has {found}"
    return None


@functools.cache
def _load(name: str, dtype: torch.dtype, C: int, device: torch.device) -> Launch:
    source, signature = KERNELS[name]
    index = torch.cuda.current_device() if device.index is None else device.index
    return load_kernel(
        (source,),
        name,
        device_index=index,
        signature=signature,
        shared_bytes=shared_bytes(name, dtype, C),
        options=options(dtype, C),
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous views may begin anywhere; kernels read 16 bytes at a time."""
    return tuple(x.clone() if x.data_ptr() % 16 else x for x in tensors)


def stages(
    load: Callable[[str, torch.dtype, int, torch.device], Launch] = _load,
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
        kernel((M, B * H, 1), 4 * C, *map(_address, tensors), T, H, M, *last)

    def chunk(w, keys, values, segment_ids, reverse, added, decay):  # type: ignore[no-untyped-def]
        tensors = (*_aligned(w, keys, values), segment_ids, added, decay)
        start("wkv6_chunk", tensors, int(reverse))

    def state(added, decay, first, reverse, states, last):  # type: ignore[no-untyped-def]
        B, H, M, _ = decay.shape
        kernel = load("scan", added.dtype, 32, added.device)
        addresses = map(_address, (None, added, decay, first, states, last))
        kernel((N // 16, B * H, 1), 32, *addresses, M, int(reverse), _DEPTH[added.dtype])

    def output(r, w, k, v, u, segment_ids, states, y):  # type: ignore[no-untyped-def]
        start("wkv6_output", (*_aligned(r, w, k, v), u, segment_ids, states, y))

    def gradients(r, w, k, v, u, segment_ids, states, dstates, dy, *grads):  # type: ignore[no-untyped-def]
        inputs = _aligned(r, w, k, v, dy)
        start("wkv6_gradients", (*inputs, u, segment_ids, states, dstates, *grads))

    return Stages(length, chunk, state, output, gradients)


wkv6_cuda = register("cuda", stages())
