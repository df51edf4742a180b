"""Dequantising by CUDA kernels of our own, one launch a weight."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.ops.cuda import availability
from rwkv_peft.ops.cuda.driver import load_kernel
from rwkv_peft.ops.cuda.launch import IO
from rwkv_peft.ops.dequantise.reference import code_table

SOURCE = Path(__file__).parent / "kernels" / "dequantise.cu"
BUILDS = [((SOURCE,), (f"-DIO={number}",)) for number in IO.values()]
objection = availability.objection

THREADS, EACH = 256, 8
# signature and bytes of shared memory of a kernel
KERNELS = {"dequantise_rows": ("3Pi", 0), "dequantise_blocks": ("4PQ", 64)}
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
        device_index=torch.cuda.current_device() if device.index is None else device.index,
        signature=signature,
        shared_bytes=shared,
        options=(f"-DIO={IO[dtype]}",),
    )


def dequantiser(load: Load) -> Callable[..., Tensor]:
    """The operator's function by kernels that `load` gives."""

    def prepare_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Launch:
        return load("dequantise_rows", dtype, device)((rows, 1, 1), THREADS, width)

    def prepare_blocks(count: int, dtype: torch.dtype, device: torch.device) -> Launch:
        grid = (-(-count // (THREADS * EACH)), 1, 1)
        return load("dequantise_blocks", dtype, device)(grid, THREADS, count)

    # a launch belongs to one thread, and autograd runs backward in threads of its own
    class Prepared(threading.local):
        def __init__(self) -> None:
            self.rows = functools.lru_cache(SHAPES)(prepare_rows)
            self.blocks = functools.lru_cache(SHAPES)(prepare_blocks)

    prepared = Prepared()

    def run(packed: Tensor, scale: Tensor, storage: str, count: int, dtype: torch.dtype) -> Tensor:
        device = packed.device
        dense = torch.empty(count, dtype=dtype, device=device)
        if not count:
            return dense
        start = packed.data_ptr(), scale.data_ptr()
        if storage == "int8":
            rows, width = packed.shape
            prepared.rows(rows, width, dtype, device)(*start, dense.data_ptr())
        else:
            codes = code_table(storage, device).data_ptr()
            prepared.blocks(count, dtype, device)(*start, codes, dense.data_ptr())
        return dense

    return run


dequantise_cuda = dequantiser(load)
