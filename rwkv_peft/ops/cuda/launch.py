"""What the CUDA backends of the recurrences share: how kernels are built, loaded and started."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.ops.cuda.driver import load_kernel

Launch = Callable[..., None]
Load = Callable[[str, torch.dtype, int, torch.device], Launch]

N = 64  # head size
IO = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCAN = Path(__file__).with_name("scan.cu")
SCAN_SIGNATURE = "6P3i"
# chunks that the scan may fetch ahead; it takes the C of its build for this
SCAN_DEPTHS = (6, 4, 3, 2)


def options(dtype: torch.dtype, C: int) -> tuple[str, ...]:
    """What a source is compiled with for inputs of a type and chunks of C tokens."""
    return f"-DIO={IO[dtype]}", f"-DC={C}"


def builds(*sources: Path) -> list[tuple[tuple[Path], tuple[str, ...]]]:
    """Every build of an operator's sources and the scan."""
    lengths = [(torch.bfloat16, 64), *((dtype, 32) for dtype in IO)]
    return [
        *(((source,), options(dtype, C)) for source in sources for dtype, C in lengths),
        *(((SCAN,), options(dtype, depth)) for dtype in IO for depth in SCAN_DEPTHS),
    ]


def row_bytes(dtype: torch.dtype) -> int:
    """A row of a tile: float32 rows are padded so that eight of them meet all banks."""
    return N * 2 if dtype == torch.bfloat16 else (N + 8) * 4


def scan_bytes(dtype: torch.dtype, depth: int) -> int:
    """Shared memory of a block of the scan."""
    size = 2 if dtype == torch.bfloat16 else 4
    return depth * ((N * N + 16 * N) * size + N * 4)


@functools.cache
def _properties(device: torch.device) -> Any:
    # PyTorch's stubs do not know all their names
    return torch.cuda.get_device_properties(device)


def device_bytes(device: torch.device) -> int:
    """Shared memory that a block on a GPU may have."""
    return int(_properties(device).shared_memory_per_block_optin)


def scan_depth(dtype: torch.dtype, blocks: int, device: torch.device) -> int:
    """As many chunks ahead as still let all blocks run at once."""
    if device.type == "cpu":
        return SCAN_DEPTHS[1]
    found = _properties(device)
    together = -(-blocks // found.multi_processor_count)
    for depth in SCAN_DEPTHS[:-1]:
        bytes_ = scan_bytes(dtype, depth)
        fits = together * (bytes_ + 1024) <= found.shared_memory_per_multiprocessor
        if fits and bytes_ <= device_bytes(device):
            return depth
    return SCAN_DEPTHS[-1]


def start_scan(
    load: Load,
    transition: Tensor | None,
    added: Tensor,
    decay: Tensor,
    first: Tensor | None,
    states: Tensor,
    last: Tensor,
    *,
    reverse: bool,
) -> None:
    """The pass over the chunks; see scan.cu."""
    B, H, M, _ = decay.shape
    depth = scan_depth(added.dtype, N // 16 * B * H, added.device)
    addresses = map(address, (transition, added, decay, first, states, last))
    kernel = load("scan", added.dtype, depth, added.device)
    kernel((N // 16, B * H, 1), 32, *addresses, M, int(reverse), depth)


def address(x: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous views may begin anywhere; kernels read 16 bytes at a time."""
    return tuple(x.clone() if x.data_ptr() % 16 else x for x in tensors)


def loader(kernels: dict[str, tuple[Path, str]], shared_bytes: Callable[..., int]) -> Load:
    """Loads a kernel of a backend once for each type, chunk length and GPU."""

    @functools.cache
    def load(name: str, dtype: torch.dtype, C: int, device: torch.device) -> Launch:
        source, signature = kernels[name]
        return load_kernel(
            (source,),
            name,
            device_index=torch.cuda.current_device() if device.index is None else device.index,
            signature=signature,
            shared_bytes=shared_bytes(name, dtype, C),
            options=options(dtype, C),
        )

    return load
