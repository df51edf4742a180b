"""What the CUDA backends of the operators share: how kernels are loaded and launched."""

import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkv_peft.ops.cuda import availability
from rwkv_peft.ops.cuda.driver import Kernel, index_of, load_kernel
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.staged import Memory, make_layout

Launch = Callable[..., None]
# gives a kernel by its name, the dtype of the inputs, the chunk length and the GPU
Load = Callable[[str, torch.dtype, int, torch.device], Callable[..., Launch]]
Length = Callable[[torch.dtype, torch.device], int]

N = 64  # head size
IO = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCAN = Path(__file__).with_name("scan.cu")
# numbers of chunks that the scan may fetch ahead
SCAN_DEPTHS = (6, 4, 3, 2)
# of shared memory, which CUDA itself takes for each block
RESERVED_BYTES = 1024
# number of input shapes whose launches are kept ready
SHAPES = 64


@dataclass(frozen=True)
class Kernels:
    """The kernels of an operator, and of the scan over its chunks.

    Attributes:
        sources: source and signature of each kernel by its name, see `driver.load_kernel`.
        shared_bytes: (name, dtype, C) -> bytes of shared memory of a block.
        largest: the name of the kernel that needs most of it, among those every call needs.
        bf16_only: the sources that are built only for bfloat16 in chunks of 64.
    """

    sources: Mapping[str, tuple[Path, str]]
    shared_bytes: Callable[[str, torch.dtype, int], int]
    largest: str
    bf16_only: Collection[Path] = ()

    def builds(self) -> list[tuple[tuple[Path], tuple[str, ...]]]:
        """Files and options of every build, for `BUILDS`."""
        lengths = [(torch.bfloat16, 64), *((dtype, 32) for dtype in IO)]
        files = dict.fromkeys(file for file, _ in self.sources.values())
        return [
            *(
                ((file,), options(dtype, C))
                for file in files
                for dtype, C in (lengths[:1] if file in self.bf16_only else lengths)
            ),
            *(((SCAN,), scan_options(dtype)) for dtype in (torch.bfloat16, torch.float32)),
        ]

    def chunk_length(self, dtype: torch.dtype, device: torch.device) -> int:
        """64 tokens in bf16 where the GPU has the shared memory for it, else 32."""
        if dtype != torch.bfloat16:
            return 32
        return 64 if max_shared_bytes(device) >= self.shared_bytes(self.largest, dtype, 64) else 32

    def objection(self, request: Request) -> str | None:
        """Why the kernels cannot serve a request; None if they can."""
        if (why := availability.objection(request)) is not None:
            return why
        wanted, found = (
            self.shared_bytes(self.largest, request.dtype, 32),
            max_shared_bytes(request.device),
        )
        if found >= wanted:
            return None
        name = str(request.dtype).removeprefix("torch.")
        return f"needs {wanted} bytes of shared memory for {name}, and this GPU has {found}"

    def load(self, name: str, dtype: torch.dtype, C: int, device: torch.device) -> Kernel:
        """A kernel for inputs of a dtype in chunks of C tokens; the scan's C is its depth."""
        file, signature, size, flags = self.recipe(name, dtype, C)
        return load_kernel(
            (file,),
            name,
            device_index=index_of(device),
            signature=signature,
            shared_bytes=size,
            options=flags,
        )

    def recipe(self, name: str, dtype: torch.dtype, C: int) -> tuple[Path, str, int, Sequence[str]]:
        """Source, signature, shared memory and options of what `load` gives."""
        if name == "scan":
            return SCAN, "6P3i", scan_bytes(dtype, C), scan_options(dtype)
        return *self.sources[name], self.shared_bytes(name, dtype, C), options(dtype, C)


class LaunchPlan:
    """What launches of an operator's kernels need for inputs of one shape, dtype and GPU.

    Attributes:
        layout: the memory between the kernels, see `staged.Layout`.
        heads: rows times heads, B * H.
        dtype, device: those of the inputs (B, T, H, N).
        C: tokens of a chunk.
    """

    def __init__(
        self,
        load: Load,
        length: Length,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        B, T, H, _ = shape
        self.C = C = length(dtype, device)
        self.dtype, self.device, self.heads = dtype, device, B * H
        self._load, self._numbers = load, (T, H, (T + C - 1) // C)
        self.layout = make_layout(shape, dtype, C)

    def template(self, memory: Memory) -> Tensor:
        """A tensor without memory of its own, for `torch.empty_like` to allocate one like it.

        This is quicker than `new_empty`, for which the shape alone costs as much as the rest.
        """
        found = torch.empty(memory.shape, dtype=memory.dtype, device=self.device)
        found.untyped_storage().resize_(0)
        return found

    def scratch(self, *parts: Memory) -> Callable[[], tuple[Tensor, list[int]]]:
        """A function that makes one allocation for several things and says where they lie in it."""
        *offsets, nbytes = accumulate((x.nbytes for x in parts), initial=0)
        like = self.template(Memory((nbytes,), torch.uint8))

        def allocate() -> tuple[Tensor, list[int]]:
            memory = torch.empty_like(like)
            start = memory.data_ptr()
            return memory, [start + offset for offset in offsets]

        return allocate

    def over_chunks(self, name: str, threads: int, *numbers: int) -> Launch:
        """A launch with a block for each chunk and `threads` for each of its tokens."""
        kernel = self._load(name, self.dtype, self.C, self.device)
        grid = (self._numbers[-1], self.heads, 1)
        return kernel(grid, threads * self.C, *self._numbers, *numbers)

    def over_heads(self, name: str, threads: int) -> Launch:
        """A launch with a block for each head of each row, `threads` for each token of a chunk."""
        kernel = self._load(name, self.dtype, self.C, self.device)
        return kernel((1, self.heads, 1), threads * self.C, *self._numbers)

    def over_states(self, *, reverse: bool) -> Launch:
        """The launch of scan.cu: (transition, added, decay, first, states, last).

        `added` and `states` may be the same memory: a warp reads its part before it writes there.
        """
        dtype = self.layout.matrices.dtype
        depth = scan_depth(dtype, N // 16 * self.heads, self.device)
        kernel = self._load("scan", dtype, depth, self.device)
        grid, numbers = (N // 16, self.heads, 1), (self._numbers[-1], int(reverse), depth)
        return kernel(grid, 32 * (N // 16), *numbers)


class Direction(Protocol):
    """A forward or a backward pass whose launches are prepared."""

    @property
    def run(self) -> Callable[..., Any]:
        """The function of tensors that runs it."""


def prepare_per_shape(
    direction: Callable[[LaunchPlan], Direction], load: Load, length: Length
) -> Callable[..., Any]:
    """A function of (r, ...) that runs a direction prepared for inputs like r.

    It is prepared once for each shape, dtype and device, and in each thread anew.
    """

    def prepare(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
        return direction(LaunchPlan(load, length, shape, dtype, device)).run

    # a launch belongs to one thread, and autograd runs backward in threads of its own
    class Prepared(threading.local):
        def __init__(self) -> None:
            self.get = functools.lru_cache(SHAPES)(prepare)

    prepared = Prepared()

    def run(r: Tensor, *others: Any) -> Any:
        return prepared.get(r.shape, r.dtype, r.device)(r, *others)

    return run


def options(dtype: torch.dtype, C: int) -> tuple[str, ...]:
    """Compiler options for inputs of a dtype and chunks of C tokens."""
    return f"-DIO={IO[dtype]}", f"-DC={C}"


def scan_options(dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler options of the scan for matrices of a dtype; they are the same for every C."""
    return (f"-DIO={IO[dtype]}",)


def row_bytes(dtype: torch.dtype) -> int:
    """Bytes of a row of a tile; float32 rows are padded so that eight of them use all banks."""
    return N * 2 if dtype == torch.bfloat16 else (N + 8) * 4


def scan_bytes(dtype: torch.dtype, depth: int) -> int:
    """Bytes of shared memory of a block of the scan."""
    size = 2 if dtype == torch.bfloat16 else 4
    return 2 * 16 * N * size + depth * ((N * N + 16 * N) * size + N * 4)


@functools.cache
def _properties(device: torch.device) -> Any:
    # PyTorch's stubs do not know all their names
    return torch.cuda.get_device_properties(device)


def max_shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block on a GPU may have."""
    return int(_properties(device).shared_memory_per_block_optin)


def num_multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU."""
    return int(_properties(device).multi_processor_count)


def blocks_per_multiprocessor(nbytes: int, device: torch.device) -> int:
    """How many blocks with so many bytes of shared memory fit on a multiprocessor."""
    return int(_properties(device).shared_memory_per_multiprocessor) // (nbytes + RESERVED_BYTES)


def scan_depth(dtype: torch.dtype, blocks: int, device: torch.device) -> int:
    """The number of chunks to fetch ahead: the largest that still lets all blocks run at once."""
    if device.type != "cuda":
        return SCAN_DEPTHS[1]
    needed = -(-blocks // num_multiprocessors(device))
    for depth in SCAN_DEPTHS[:-1]:
        bytes_ = scan_bytes(dtype, depth)
        if needed <= blocks_per_multiprocessor(bytes_, device) and bytes_ <= max_shared_bytes(
            device
        ):
            return depth
    return SCAN_DEPTHS[-1]


def align(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Tensors as kernels read them, contiguous and aligned to 16 bytes, and their addresses."""
    found = [*map(Tensor.contiguous, tensors)]
    addresses = [*map(Tensor.data_ptr, found)]
    if any(map((15).__and__, addresses)):
        return align(*[x.clone() if x.data_ptr() % 16 else x for x in found])
    return found, addresses


def locate(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A contiguous tensor and its address; None and 0 for None."""
    if x is None:
        return None, 0
    x = x.contiguous()
    return x, x.data_ptr()
