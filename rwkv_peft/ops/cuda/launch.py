"""What the CUDA backends of the recurrences share: how kernels are built, loaded and started."""

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
from rwkv_peft.ops.cuda.driver import Kernel, load_kernel
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.staged import Memory, layout

Launch = Callable[..., None]
# gives a kernel by its name, the type of inputs, chunk length and GPU
Load = Callable[[str, torch.dtype, int, torch.device], Callable[..., Launch]]
Length = Callable[[torch.dtype, torch.device], int]

N = 64  # head size
IO = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCAN = Path(__file__).with_name("scan.cu")
# chunks that the scan may fetch ahead
SCAN_DEPTHS = (6, 4, 3, 2)
# of shared memory, which CUDA takes for each block
RESERVED_BYTES = 1024
# shapes of inputs whose launches are kept ready
SHAPES = 64


@dataclass(frozen=True)
class Kernels:
    """The kernels of an operator, and of the scan over its chunks.

    Attributes:
        sources: of each kernel the source and the signature, as `driver.load_kernel` wants them.
        shared_bytes: (name, dtype, C) -> shared memory of a block.
        largest: name of the kernel that every call needs and that needs most of it.
        narrow: the sources that are built for bfloat16 in chunks of 64 alone.
    """

    sources: Mapping[str, tuple[Path, str]]
    shared_bytes: Callable[[str, torch.dtype, int], int]
    largest: str
    narrow: Collection[Path] = ()

    def builds(self) -> list[tuple[tuple[Path], tuple[str, ...]]]:
        """Files and options of every build, for `BUILDS`."""
        lengths = [(torch.bfloat16, 64), *((dtype, 32) for dtype in IO)]
        files = dict.fromkeys(file for file, _ in self.sources.values())
        return [
            *(
                ((file,), options(dtype, C))
                for file in files
                for dtype, C in (lengths[:1] if file in self.narrow else lengths)
            ),
            *(((SCAN,), scan_options(dtype)) for dtype in (torch.bfloat16, torch.float32)),
        ]

    def chunk_length(self, dtype: torch.dtype, device: torch.device) -> int:
        """64 tokens in bf16 where the GPU has the shared memory for it, else 32."""
        if dtype != torch.bfloat16:
            return 32
        return 64 if device_bytes(device) >= self.shared_bytes(self.largest, dtype, 64) else 32

    def objection(self, request: Request) -> str | None:
        """Why the kernels cannot serve a request; None if they can."""
        if (why := availability.objection(request)) is not None:
            return why
        wanted, found = (
            self.shared_bytes(self.largest, request.dtype, 32),
            device_bytes(request.device),
        )
        if found >= wanted:
            return None
        name = str(request.dtype).removeprefix("torch.")
        return f"needs {wanted} bytes of shared memory for {name}, and this GPU has {found}"

    def load(self, name: str, dtype: torch.dtype, C: int, device: torch.device) -> Kernel:
        """A kernel for inputs of a type in chunks of C tokens; the scan's C is its depth."""
        file, signature, size, flags = self.recipe(name, dtype, C)
        return load_kernel(
            (file,),
            name,
            device_index=torch.cuda.current_device() if device.index is None else device.index,
            signature=signature,
            shared_bytes=size,
            options=flags,
        )

    def recipe(self, name: str, dtype: torch.dtype, C: int) -> tuple[Path, str, int, Sequence[str]]:
        """Source, signature, shared memory and options of what `load` gives."""
        if name == "scan":
            return SCAN, "6P3i", scan_bytes(dtype, C), scan_options(dtype)
        return *self.sources[name], self.shared_bytes(name, dtype, C), options(dtype, C)


class Starts:
    """Launches of an operator's kernels for inputs (B, T, H, N) of one shape, type and GPU.

    Attributes:
        layout: of the memory between them.
        heads: rows times heads.
        dtype, C, device: type of the inputs, tokens of a chunk, and where they are.
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
        self.layout = layout(shape, dtype, C)

    def like(self, memory: Memory) -> Tensor:
        """A tensor that holds no memory, of which `torch.empty_like` makes one that does.

        To `new_empty` its shape alone is as much work as the rest of the allocation.
        """
        found = torch.empty(memory.shape, dtype=memory.dtype, device=self.device)
        found.untyped_storage().resize_(0)
        return found

    def scratch(self, *parts: Memory) -> Callable[[], tuple[Tensor, list[int]]]:
        """Gives one allocation for several things, and where they lie in it."""
        *offsets, nbytes = accumulate((x.nbytes for x in parts), initial=0)
        like = self.like(Memory((nbytes,), torch.uint8))

        def allocate() -> tuple[Tensor, list[int]]:
            memory = torch.empty_like(like)
            start = memory.data_ptr()
            return memory, [start + offset for offset in offsets]

        return allocate

    def over_chunks(self, name: str, threads: int, *numbers: int) -> Launch:
        """A kernel with a block a chunk, of so many threads a token; given T, H, M and numbers."""
        kernel = self._load(name, self.dtype, self.C, self.device)
        grid = (self._numbers[-1], self.heads, 1)
        return kernel(grid, threads * self.C, *self._numbers, *numbers)

    def over_heads(self, name: str, threads: int) -> Launch:
        """A kernel with a block for each head of each row, of so many threads a chunk's token."""
        kernel = self._load(name, self.dtype, self.C, self.device)
        return kernel((1, self.heads, 1), threads * self.C, *self._numbers)

    def over_states(self, *, reverse: bool) -> Launch:
        """The pass over the chunks, see scan.cu: (transition, added, decay, first, states, last).

        A warp has read its part of `added` when it writes that of `states`, so that both may be
        the same memory.
        """
        dtype = self.layout.matrices.dtype
        depth = scan_depth(dtype, N // 16 * self.heads, self.device)
        kernel = self._load("scan", dtype, depth, self.device)
        grid, numbers = (N // 16, self.heads, 1), (self._numbers[-1], int(reverse), depth)
        return kernel(grid, 32 * (N // 16), *numbers)


class Direction(Protocol):
    """A forward or a backward pass with its launches made ready."""

    @property
    def run(self) -> Callable[..., Any]:
        """Its function of tensors."""


def per_shape(
    direction: Callable[[Starts], Direction], load: Load, length: Length
) -> Callable[..., Any]:
    """A function of (r, ...) that makes a direction ready for inputs like r, and runs it.

    It is made ready once in each thread.
    """

    def prepare(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
        return direction(Starts(load, length, shape, dtype, device)).run

    # a launch is a thread's own, and autograd's backward runs in threads of its own
    class Ready(threading.local):
        def __init__(self) -> None:
            self.of = functools.lru_cache(SHAPES)(prepare)

    ready = Ready()

    def run(r: Tensor, *others: Any) -> Any:
        return ready.of(r.shape, r.dtype, r.device)(r, *others)

    return run


def options(dtype: torch.dtype, C: int) -> tuple[str, ...]:
    """What a source is compiled with for inputs of a type and chunks of C tokens."""
    return f"-DIO={IO[dtype]}", f"-DC={C}"


def scan_options(dtype: torch.dtype) -> tuple[str, ...]:
    """What the scan is compiled with for matrices of a type; it is the same for every C."""
    return (f"-DIO={IO[dtype]}",)


def row_bytes(dtype: torch.dtype) -> int:
    """A row of a tile: float32 rows are padded so that eight of them meet all banks."""
    return N * 2 if dtype == torch.bfloat16 else (N + 8) * 4


def scan_bytes(dtype: torch.dtype, depth: int) -> int:
    """Shared memory of a block of the scan."""
    size = 2 if dtype == torch.bfloat16 else 4
    return 2 * 16 * N * size + depth * ((N * N + 16 * N) * size + N * 4)


@functools.cache
def _properties(device: torch.device) -> Any:
    # PyTorch's stubs do not know all their names
    return torch.cuda.get_device_properties(device)


def device_bytes(device: torch.device) -> int:
    """Shared memory that a block on a GPU may have."""
    return int(_properties(device).shared_memory_per_block_optin)


def multiprocessors(device: torch.device) -> int:
    """Their number on a GPU."""
    return int(_properties(device).multi_processor_count)


def resident(nbytes: int, device: torch.device) -> int:
    """How many blocks of so much shared memory fit a multiprocessor."""
    return int(_properties(device).shared_memory_per_multiprocessor) // (nbytes + RESERVED_BYTES)


def scan_depth(dtype: torch.dtype, blocks: int, device: torch.device) -> int:
    """As many chunks ahead as still let all blocks run at once."""
    if device.type != "cuda":
        return SCAN_DEPTHS[1]
    together = -(-blocks // multiprocessors(device))
    for depth in SCAN_DEPTHS[:-1]:
        bytes_ = scan_bytes(dtype, depth)
        if together <= resident(bytes_, device) and bytes_ <= device_bytes(device):
            return depth
    return SCAN_DEPTHS[-1]


def readable(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Tensors as kernels read them, without gaps and from multiples of 16 bytes on, and where."""
    found = [*map(Tensor.contiguous, tensors)]
    addresses = [*map(Tensor.data_ptr, found)]
    if any(map((15).__and__, addresses)):
        return readable(*[x.clone() if x.data_ptr() % 16 else x for x in found])
    return found, addresses


def located(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor without gaps, and where it lies; 0 for none."""
    if x is None:
        return None, 0
    x = x.contiguous()
    return x, x.data_ptr()
