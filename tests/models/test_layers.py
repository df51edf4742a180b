"""The layers with a backward of their own, against autograd's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.models.layers import (
    PackingInfo,
    shift_mix,
    shift_mix_products,
    squared_relu,
    token_shift,
)
from rwkv_peft.ops.cases import make_segment_ids

B, D = 2, 6


def by_autograd(x: Tensor, shift: Tensor | None, packing: PackingInfo, mix: Tensor) -> list[Tensor]:
    last = token_shift(x, shift, packing)
    x, last = x.flatten(0, 1), last.flatten(0, 1)
    return [x + (last - x) * m for m in mix]


def results(
    form: Callable[..., Any], dtype: torch.dtype, T: int, num: int, *, has_all: bool
) -> list[Tensor]:
    """Outputs, and the gradients of x, mix, and the shift if there is one."""
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, mix, shift = draw(B, T, D), draw(num, B * T if has_all else 1, D), draw(B, D)
    inputs = [t.requires_grad_() for t in ((x, mix, shift) if has_all else (x, mix))]
    packing = PackingInfo.of(make_segment_ids(B, T)) if has_all else PackingInfo()
    mixed = form(x, shift if has_all else None, packing, mix)
    loss = torch.stack([(y * draw(B * T, D)).double().sum() for y in mixed]).sum()
    return [*(y.detach() for y in mixed), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("has_all", [False, True], ids=["plain", "state, documents, by token"])
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 40])
def test_the_mix_with_the_last_token_equals_its_formula(T: int, num: int, has_all: bool) -> None:
    ours, formula = (
        results(form, torch.float64, T, num, has_all=has_all) for form in (shift_mix, by_autograd)
    )
    assert len(ours) == num + 2 + has_all
    for one, other in zip(ours, formula, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_all", [False, True], ids=["plain", "state, documents, by token"])
def test_the_mix_in_bf16_is_within_the_error_budget(has_all: bool) -> None:
    formula, plain, ours = (
        results(form, dtype, 40, 6, has_all=has_all)
        for form, dtype in (
            (by_autograd, torch.float64),
            (by_autograd, torch.bfloat16),
            (shift_mix, torch.bfloat16),
        )
    )
    for exact, p, o in zip(formula, plain, ours, strict=True):
        budget = 2 * (p - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (o - exact).abs().max() <= budget


@pytest.mark.parametrize("has_all", [False, True], ids=["plain", "state, documents, by token"])
def test_mixes_made_in_one_launch_are_those_made_alone(has_all: bool) -> None:
    at_once, alone = (
        results(partial(shift_mix, sizes=sizes), torch.bfloat16, 40, 5, has_all=has_all)
        for sizes in ((3, 2), ())
    )
    assert all(torch.equal(one, other) for one, other in zip(at_once, alone, strict=True))


def product_results(form: Callable[..., Any], dtype: torch.dtype, *, has_all: bool) -> list[Tensor]:
    """Products of rows with narrow maps, and the gradients of x and of the shift."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # shares of the last token from none to all, and some beyond
    mix = [(draw(1, 1, 64) / 2 + 0.5).to(dtype) for _ in range(3)]
    weights = [draw(64, width) for width in (8, 3, 16)]
    inputs = [x.requires_grad_() for x in (draw(B, 40, 64), draw(B, 64))[: 1 + has_all]]
    packing = PackingInfo.of(make_segment_ids(B, 40)) if has_all else PackingInfo()
    found = form(inputs[0], inputs[1] if has_all else None, packing, mix, weights)
    loss = torch.stack([(y * draw(*y.shape)).double().sum() for y in found]).sum()
    return [*(y.detach() for y in found), *torch.autograd.grad(loss, inputs)]


def products_of_mixes(
    x: Tensor, shift: Tensor | None, packing: PackingInfo, mix: list[Tensor], weights: list[Tensor]
) -> list[Tensor]:
    rows = by_autograd(x, shift, packing, torch.cat(mix))
    return [x @ w for x, w in zip(rows, weights, strict=True)]


@pytest.mark.parametrize("has_all", [False, True], ids=["plain", "state, documents"])
def test_products_of_mixed_rows_are_one_product_of_the_rows(has_all: bool) -> None:
    exact, ours, plain, narrow = (
        product_results(form, dtype, has_all=has_all)
        for form, dtype in (
            (products_of_mixes, torch.float64),
            (shift_mix_products, torch.float64),
            (products_of_mixes, torch.bfloat16),
            (shift_mix_products, torch.bfloat16),
        )
    )
    assert len(ours) == 4 + has_all
    for wanted, one, p, n in zip(exact, ours, plain, narrow, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)
        budget = 2 * (p - wanted).abs().max() + torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (n - wanted).abs().max() <= budget


def test_the_squared_relu_has_the_gradient_of_its_formula() -> None:
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).requires_grad_()
    assert torch.equal(squared_relu(x), torch.relu(x) ** 2)
    assert torch.autograd.gradcheck(squared_relu, x)


@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_gradients_of_all_weights_equal_finite_differences(
    version: str, make_model_file: Callable[..., Path]
) -> None:
    ranks = {"x060": {"maa": 16, "decay": 32}, "x052": {}}
    changes = {"version": version, "ranks": ranks[version]} if version in ranks else {}
    model = rwkv_peft.load_model(make_model_file(**changes), dtype="float64")
    tokens = torch.arange(1, 25).view(1, 24)
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        return model(tokens)[0].square().sum()

    parameters = [p.requires_grad_() for p in model.parameters()]
    value = loss()
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    step = 1e-5
    # the rounding of the two losses, over the distance between them
    rounding = 16 * torch.finfo(torch.float64).eps * value.item() / step
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        if gradient is None:
            assert name in {f"blocks.0.att.v{i}" for i in range(3)}
            continue
        # along the signs of the gradient nothing cancels, so no entry of it may be wrong
        drawn = torch.rand(p.shape, generator=generator, dtype=torch.float64) / 20
        direction = gradient.sign() * drawn
        slope = (gradient * direction).sum()
        assert slope.abs() > 1000 * rounding, name
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                p += sign * step * direction
                ends.append(loss())
            p += step * direction
        found = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=rounding)
