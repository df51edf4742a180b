"""Products of FP8: what they round, in both directions, and where they are refused."""

import re

import pytest
import torch
from torch import Tensor

from rwkv_peft.errors import ConfigError
from rwkv_peft.quant import Storage, quantise

BF16 = Storage("fp8", torch.bfloat16)


def e4m3() -> Tensor:
    """All numbers of the format by its definition, from 0: 4 bits of exponent, 3 of mantissa."""
    small = [m * 2.0**-9 for m in range(8)]
    # the last pattern is no number, and there is no infinity
    large = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    return torch.tensor(small + large, dtype=torch.float64)


def rounded(x: Tensor) -> Tensor:
    """The nearest numbers of the format over a row's scale, the even one of two."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    numbers, wanted = e4m3(), (x.float() / scale).double().unsqueeze(-1)
    odd = torch.arange(len(numbers), dtype=torch.float64) % 2
    nearest = ((wanted.abs() - numbers).abs() * (1 + 1e-12 * odd)).argmin(-1)
    return numbers[nearest] * x.double().sign() * scale


def test_the_largest_number_is_448() -> None:
    assert e4m3().max() == 448 == torch.finfo(torch.float8_e4m3fn).max


def test_both_directions_are_products_of_rounded_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(48, 64, generator=generator) / 8).bfloat16()
    w[3] = 0
    layer = quantise(w, BF16)
    x = torch.randn(5, 64, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(5, 48, generator=generator).bfloat16()
    y = layer(x)
    y.backward(dy)
    for found, left, right in (
        (y.detach(), x.detach(), w),
        (x.grad, dy, w.T),
    ):
        assert found is not None
        one, other = rounded(left), rounded(right)
        # the result's own rounding, and sums in float32
        budget = 2**-8 * (one @ other.T).abs() + 64 * 2**-23 * (one.abs() @ other.abs().T)
        assert ((found.double() - one @ other.T).abs() <= budget).all()
        # and within what 3 bits of mantissa lose of the exact product
        exact = left.double() @ right.double().T
        error = (found.double() - exact).norm() / exact.norm()
        assert 0 < error < 2**-4
    assert torch.equal(layer.dense().double(), rounded(w).bfloat16().double())


def test_a_narrow_product_is_added_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    w, x, dy = draw(48, 64) / 8, draw(5, 64), draw(5, 48)
    u, a, b = draw(5, 4), draw(4, 64), draw(4, 48)
    layer = quantise(w, BF16)
    for found, left, right, narrow in (
        (layer.product_plus(x, u, b), x, w, b),
        (layer.transposed_plus(dy, u, a), dy, w.T, a),
    ):
        one, other = rounded(left), rounded(right)
        wide, added = one @ other.T, u.double() @ narrow.double()
        # both are rounded, the wide one before and after it is added to
        budget = 2**-8 * (wide.abs() + (wide + added).abs())
        budget += (
            64 * 2**-23 * (one.abs() @ other.abs().T + u.double().abs() @ narrow.double().abs())
        )
        assert ((found.double() - wide - added).abs() <= budget).all()


def test_only_bytes_are_kept_twice_and_once_more_the_scales() -> None:
    layer = quantise(torch.randn(32, 64), BF16)
    assert layer.num_bytes == 2 * 32 * 64 + 4 * (32 + 64)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in kept} == {
        layer.turned.data_ptr(),
        layer.turned_scale.data_ptr(),
    }


def test_what_is_not_of_the_dtype_of_training_is_not_rounded() -> None:
    layer = quantise(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), BF16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ layer.dense(torch.float64).T
    assert (layer(x).double() - exact).norm() < 1e-6 * exact.norm()


def test_a_side_that_cards_cannot_multiply_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("multiples of 16, and one is (24, 64)")):
        quantise(torch.randn(24, 64), BF16)
