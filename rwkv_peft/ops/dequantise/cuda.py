"""Dequantising by CUDA kernels of our own, one launch a weight."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.ops.cuda import availability
from rwkv_peft.ops.cuda.driver import index_of, load_kernel
from rwkv_peft.ops.cuda.launch import IO
from rwkv_peft.ops.dequantise.reference import GROUP, NESTED, code_table, share_table

SOURCE = Path(__file__).parent / "kernels" / "dequantise.cu"
BUILDS = [((SOURCE,), (f"-DIO={number}",)) for number in IO.values()]
objection = availability.objection

# threads of a block, and numbers that each makes
THREADS = 256
EACH = {"dequantise_rows": 16, "dequantise_blocks": 16, "dequantise_nested": 32}
# signature and bytes of shared memory of a kernel
KERNELS = {
    "dequantise_rows": ("3PQI", 0),
    "dequantise_blocks": ("4PQ", 64),
    "dequantise_nested": ("5PQ", 64 + 4 * GROUP),
}
# number of weights' shapes whose launches are kept ready
SHAPES = 256

Launch = Callable[..., None]
# gives a kernel by its name, the dtype of the result and the GPU
Load = Callable[[str, torch.dtype, torch.device], Callable[..., Launch]]


def load(name: str, dtype: torch.dtype, device: torch.device) -> Callable[..., Launch]:
    """A kernel for results of a dtype."""
    signature, shared = KERNELS[name]
    return load_kernel(
        (SOURCE,),
        name,
        device_index=index_of(device),
        signature=signature,
        shared_bytes=shared,
        options=(f"-DIO={IO[dtype]}",),
    )


def dequantiser(load: Load) -> Callable[[Tensor, Tensor, str, Tensor], None]:
    """The operator's function by kernels that `load` gives."""

    def prepare(
        name: str, numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Launch:
        grid = (-(-numbers[0] // (THREADS * EACH[name])), 1, 1)
        return load(name, dtype, device)(grid, THREADS, *numbers)

    # a launch belongs to one thread, and autograd runs backward in threads of its own
    class Prepared(threading.local):
        def __init__(self) -> None:
            self.get = functools.lru_cache(SHAPES)(prepare)

    prepared = Prepared()

    def run(packed: Tensor, scale: Tensor, storage: str, dense: Tensor) -> None:
        device, count = packed.device, len(dense)
        start = packed.data_ptr(), scale.data_ptr()
        if storage == "int8":
            numbers = count, packed.shape[1]
            launch = prepared.get("dequantise_rows", numbers, dense.dtype, device)
            launch(*start, dense.data_ptr())
            return
        codes = code_table(storage, device).data_ptr()
        if storage in NESTED:
            launch = prepared.get("dequantise_nested", (count,), dense.dtype, device)
            launch(*start, codes, share_table(device).data_ptr(), dense.data_ptr())
        else:
            launch = prepared.get("dequantise_blocks", (count,), dense.dtype, device)
            launch(*start, codes, dense.data_ptr())

    return run


dequantise_cuda = dequantiser(load)
