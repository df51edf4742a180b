"""Backends that make stored weights dense: every one gives the bits of the form in PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from rwkv_peft.ops.cuda.launch import IO
from rwkv_peft.ops.dequantise import TABLE, cuda, dequantise, kernel_for
from rwkv_peft.ops.dequantise.reference import CODES, NESTED, dequantise_reference
from rwkv_peft.ops.dispatch import Request
from tests.ops.emulation import emulator

STORAGES = ("int8", *CODES)
# out, in: rows that fill launches and those that do not, odd ones, one beyond 256 threads of eight
SHAPES = ((3, 64), (2, 2048 + 8), (7, 100), (5, 33), (1, 1), (1, 129), (5, 4096))


def stored(storage: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Every byte that there is, and scales from the largest to none."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, width = shape
    if storage == "int8":
        packed = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand(rows, 1, generator=generator)
    else:
        size = -(-rows * width // 2)
        packed = torch.randint(0, 256, (size, 1), generator=generator, dtype=torch.uint8)
        scale = torch.rand(-(-rows * width // 64), generator=generator)
    if storage in NESTED:
        # every place, and what groups end with
        groups = -(-rows * width // 64 // 256)
        places = torch.randint(0, 256, (groups, 256), generator=generator, dtype=torch.uint8)
        ends = torch.rand(groups, 2, generator=generator)
        return packed, torch.cat((places, ends.view(torch.uint8)), 1)
    scale.view(-1)[-1] = 1e-9
    return packed, scale


def expanded(scale: Tensor) -> Tensor:
    """The scales of nested ones, by bitsandbytes' table and two operations that round."""
    table = create_dynamic_map().double()
    found = []
    for group in scale:
        largest, mean = group[256:].view(torch.float32).double()
        product = (table[group[:256].int()] * largest).float()
        found.append((product.double() + mean).float())
    return torch.cat(found)


def exact(packed: Tensor, scale: Tensor, storage: str, count: int, dtype: torch.dtype) -> Tensor:
    """By the words of the contract: float32 products, of one number after the other."""
    if storage == "int8":
        rows = packed.double().mul(scale.double()).float()
        return rows.flatten().to(dtype)
    codes = [c for byte in packed.flatten().tolist() for c in (byte >> 4, byte & 15)][:count]
    values = torch.tensor([CODES[storage][c] for c in codes], dtype=torch.float32).double()
    scale = expanded(scale) if storage in NESTED else scale
    scales = scale.double().repeat_interleave(64)[:count]
    return (values * scales).float().to(dtype)


def check(
    function: Callable[..., None],
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = tuple(IO),
) -> None:
    """Fails unless a backend gives the exact bits of every storage, shape and dtype."""
    for storage in STORAGES:
        for shape in SHAPES:
            packed, scale = stored(storage, shape)
            count = shape[0] * shape[1]
            for dtype in dtypes:
                found = torch.full((count,), torch.nan, dtype=dtype, device=device)
                function(packed.to(device), scale.to(device), storage, found)
                wanted = exact(packed, scale, storage, count, dtype)
                assert torch.equal(found.cpu(), wanted), (storage, shape, dtype)


def test_the_form_in_pytorch_gives_the_numbers_of_the_contract() -> None:
    def whole(packed: Tensor, scale: Tensor, storage: str, dense: Tensor) -> None:
        found = dequantise(packed, scale, storage, len(dense), dense.dtype)
        assert found.shape == dense.shape and found.dtype == dense.dtype
        dense.copy_(found)

    check(dequantise_reference)
    check(whole)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_without_numbers_is_none(storage: str) -> None:
    packed, scale = stored(storage, (1, 64))
    found = dequantise(packed[:0], scale, storage, 0, torch.float16)
    assert found.shape == (0,) and found.dtype == torch.float16


@emulator.needs_compiler
def test_the_cuda_kernels_give_the_same_bits() -> None:
    def load(name: str, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
        (options,) = (o for (_, o) in cuda.BUILDS if o == (f"-DIO={IO[dtype]}",))
        return emulator.load(cuda.SOURCE, name, *cuda.KERNELS[name], options)

    check(cuda.dequantiser(load))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", TABLE, ids=lambda x: x.name)
def test_every_backend_gives_the_same_bits_on_a_gpu(backend: Any) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    if (why := backend.objection(Request(device, torch.bfloat16, 64))) is not None:
        pytest.skip(why)
    check(backend.load(), str(device))


def test_a_cpu_takes_the_form_in_pytorch_and_kernels_say_what_they_need() -> None:
    cpu = torch.device("cpu")
    assert kernel_for(cpu, torch.float32) is dequantise_reference
    request = Request(cpu, torch.bfloat16, 64)
    said = {backend.name: backend.objection(request) for backend in TABLE}
    assert said == {"cuda": "needs an NVIDIA GPU", "triton": "needs a GPU", "torch": None}
