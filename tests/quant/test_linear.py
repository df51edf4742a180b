"""Stored weights: bitsandbytes' numbers, products in float64, and what backward keeps."""

import math

import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    quantize_4bit,
)
from torch import Tensor, nn

from rwkv_peft.ops.dequantise.reference import CODES, NESTED, share_table
from rwkv_peft.quant import STORAGES, Storage, quantise, round_trip
from rwkv_peft.quant import linear as quant_linear

# fp8 rounds what it multiplies too
DENSE = [name for name in STORAGES if name != "fp8"]
# of a run, in which fp4_nested has nothing of its own
IN_RUNS = [name for name in DENSE if name != "fp4_nested"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# out, in: blocks that end with rows, that cross them, a last one that is not full, an odd width,
# and more blocks than a group of scales has
SHAPES = ((128, 64), (64, 256), (7, 192), (128, 96), (100, 100), (10, 33), (300, 100))


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    made = torch.randn(shape, generator=generator) / 8
    # zeros, one number far from all others, and numbers near the smallest
    made[0], made[1, 3], made[2] = 0, 40, made[2] * 1e-6
    return made.to(dtype)


def nest_by_bitsandbytes(state: QuantState) -> QuantState:
    """Its state with nested scales, of one without.

    As it does in PyTorch: its kernel for CPUs looks places up in a coarser table. And by the exact
    mean, where it has what PyTorch's sum in float32 gives on a device with so many threads.
    """
    mean = torch.tensor(math.fsum(state.absmax.tolist()) / len(state.absmax))
    store = torch.ops.bitsandbytes.quantize_blockwise.default
    in_pytorch = torch._C.DispatchKey.CompositeExplicitAutograd
    places, largest = store._op_dk(in_pytorch, state.absmax - mean, create_dynamic_map(), 256)
    inner = QuantState(largest, code=create_dynamic_map(), blocksize=256, dtype=torch.float32)
    return QuantState(
        places, state.shape, state.code, 64, state.quant_type, state.dtype, mean, inner
    )


def oracle(w: Tensor, name: str) -> Tensor:
    """A weight as bitsandbytes stores and gives it."""
    # flat, as its kernel for AVX-512 begins a block with each row, where all others do not
    packed, state = quantize_4bit(
        w.flatten(), blocksize=64, quant_type=name.removesuffix("_nested")
    )
    state = nest_by_bitsandbytes(state) if name in NESTED else state
    # for odd sizes it compiles, each size anew
    with torch.compiler.set_stance("force_eager"):
        return dequantize_4bit(packed, state).view(w.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    w = weight(shape, dtype)
    # flat, as its kernel for AVX-512 begins a block with each row, where all others do not
    packed, state = quantize_4bit(w.flatten(), blocksize=64, quant_type=name)
    layer = quantise(w, Storage(name, dtype))
    assert torch.equal(layer.weight, packed) and torch.equal(layer.scale, state.absmax)
    assert torch.equal(layer.dense().flatten(), dequantize_4bit(packed, state).flatten())
    assert layer.num_bytes == packed.nbytes + state.absmax.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODES)
def test_dense_weights_are_those_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (1, 1), (3, 65), (513, 129)):
        given = [torch.full(shape, x, dtype=dtype) for x in (0, 0.3)]
        if shape[0] > 2:
            given.append(weight(shape, dtype))
        for w in given:
            layer = quantise(w, Storage(name, dtype))
            assert torch.equal(layer.dense(), oracle(w, name)), shape


@pytest.mark.parametrize("name", NESTED)
def test_nested_scales_take_what_those_of_bitsandbytes_do(name: str) -> None:
    for shape in SHAPES:
        w = weight(shape, torch.bfloat16)
        layer = quantise(w, Storage(name, torch.bfloat16))
        packed, state = quantize_4bit(
            w.flatten(), blocksize=64, quant_type=name[:3], compress_statistics=True
        )
        assert torch.equal(layer.weight, packed) and layer.scale.dtype == torch.uint8
        ends = layer.scale[:, 256:].view(torch.float32)
        # of 16-bit numbers the sum in float32 is exact
        assert torch.equal(ends[:, 0], state.state2.absmax) and (ends[:, 1] == state.offset).all()
        # a mean for each group, and the last group whole
        held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        assert 0 <= layer.num_bytes - held - 4 * len(ends) < 256
        assert layer.num_bytes == type(layer).count_bytes(*shape)


def test_the_table_of_nested_scales_is_that_of_bitsandbytes() -> None:
    assert torch.equal(share_table(torch.device("cpu")), create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_off_by_half_a_step_of_its_row(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = weight(shape, dtype)
    layer = quantise(w, Storage("int8", dtype))
    step = w.double().abs().amax(1, keepdim=True) / 127
    eps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    error = (layer.dense().double() - w.double()).abs()
    # half a step, the rounding of the result, and in fp16 of what is below its smallest number
    assert (error <= step / 2 * (1 + 1e-4) + eps * w.double().abs() + eps * step + 1e-7).all()
    assert layer.num_bytes == w.numel() + 4 * shape[0]


@pytest.mark.parametrize("name", DENSE)
def test_rows_are_those_of_the_whole(name: str) -> None:
    for shape in SHAPES:
        layer = quantise(weight(shape, torch.float32), Storage(name, torch.bfloat16))
        whole = layer.dense()
        for rows in (slice(0, 2), slice(3, 6), slice(170, 175), slice(5, 10_000), slice(2, 2),
                     slice(None)):  # fmt: skip
            assert torch.equal(layer.dense(rows=rows), whole[rows])
            assert torch.equal(layer.dense(torch.float32, rows), whole[rows].float())
        # storing what was stored changes nothing that 8 bits tell apart
        if name == "int8":
            layer.store(layer.dense(torch.float32))
            torch.testing.assert_close(layer.dense(), whole, rtol=2**-7, atol=0)


@pytest.mark.parametrize("at_once", [1 << 26, 64 * 256, 1])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_products_are_those_of_the_dense_weight_and_only_the_stored_one_is_kept(
    name: str, is_compiled: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_linear, "MAX_DENSE", at_once)
    layer = quantise(weight((136, 256), torch.float32), Storage(name, torch.float32))
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if is_compiled else layer
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(2, 5, 136, generator=torch.Generator().manual_seed(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call(x)
    y.backward(dy)
    dense = layer.dense(torch.float64)
    # 256 products of float32 in any order
    budget = 256 * torch.finfo(torch.float32).eps
    for found, left, right in (
        (y.detach(), x.detach().double(), dense.T),
        (x.grad, dy.double(), dense),
    ):
        assert found is not None
        assert ((found - left @ right).abs() <= budget * (left.abs() @ right.abs())).all()
    assert kept and all(k.numel() < dense.numel() or k.dtype == torch.int8 for k in kept)


@pytest.mark.parametrize("name", DENSE)
def test_a_weight_stored_in_pieces_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        w, storage = weight(shape, torch.bfloat16), Storage(name, torch.bfloat16)
        whole = quantise(w, storage)
        with monkeypatch.context() as patch:
            patch.setattr(quant_linear, "PIECE", 128)
            pieces = quantise(w, storage)
        assert torch.equal(whole.weight, pieces.weight) and torch.equal(whole.scale, pieces.scale)


@pytest.mark.parametrize("name", DENSE)
def test_a_stored_layer_has_two_plain_frozen_tensors(name: str) -> None:
    layer = quantise(weight((64, 64), torch.float32), Storage(name, torch.float32))
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert tensors.keys() == {"weight", "scale"}
    assert type(layer.weight) is nn.Parameter and type(layer.scale) is Tensor
    assert not any(x.requires_grad or x.is_meta for x in tensors.values())
    assert torch.equal(round_trip(torch.zeros(8, 64), Storage(name, torch.float16)),
                       torch.zeros(8, 64, dtype=torch.float16))  # fmt: skip
