"""AdamW's kernel in Triton's interpreter, on the CPU; `test_adamw` runs this file.

A process of its own, since the interpreter is chosen when Triton is imported.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.ops import adamw
from rwkv_peft.training.halves import join, split
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.optim import Optimizer

RATES = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 6


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    high, low = torch.empty_like(values).bfloat16(), torch.empty_like(values).to(torch.int16)
    split(values.clone(), high, low)
    return high, low


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [None, 0.37])
@pytest.mark.parametrize("skipped", [None, 3])
def test_steps_are_as_near_the_exact_ones_as_those_of_pytorch(
    dtype: torch.dtype, factor: float | None, skipped: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    # no multiple of what a program takes; the gradients shrink, so that moments are of all sizes
    start = torch.randn(3000, generator=generator)
    high, low = halves(start)
    master, exact, plain = (nn.Parameter(x) for x in (start, start.double(), start.clone()))
    own = torch.optim.AdamW([master], **RATES, fused=True)
    others = {
        x: torch.optim.AdamW([x], **RATES, fused=x is plain, foreach=False) for x in (exact, plain)
    }
    for number in range(STEPS):
        gradient = torch.randn(start.shape, generator=generator) * 10.0**-number
        gradient = gradient.to(dtype)
        lr = RATES["lr"] * (1 + number)
        for optimizer in (own, *others.values()):
            optimizer.param_groups[0]["lr"] = lr
        before = high.clone(), low.clone()
        if skipped is not None:
            own.found_inf = torch.tensor(float(number == skipped))  # type: ignore[attr-defined]
        scale = None if factor is None else torch.tensor(factor)
        adamw.step_in_place(own, master, high, low, gradient, scale)
        if number == skipped:
            assert torch.equal(high, before[0])
            assert torch.equal(low, before[1])
            continue
        for x, optimizer in others.items():
            x.grad = gradient.to(x.dtype) * (1 if scale is None else scale.to(x.dtype))
            optimizer.step()
        value, kept = join(high, low), own.state[master]
        error, usual = ((x.detach().double() - exact).abs().max() for x in (value, plain))
        assert error <= 1.5 * usual
        assert torch.equal(*halves(value)[:1], high)
        for name in ("exp_avg", "exp_avg_sq"):
            wanted = others[exact].state[exact][name]
            assert ((kept[name] - wanted).abs() <= 2e-7 * STEPS * wanted.abs().max()).all()
        assert kept["step"] == others[exact].state[exact]["step"]


def make_optimizer(values: list[Tensor]) -> tuple[Optimizer, list[nn.Parameter]]:
    parameters = [nn.Parameter(x.clone()) for x in values]
    trained = {f"{i}.weight": x for i, x in enumerate(parameters)}
    grouping = Grouping(plain=["0.weight"])
    rates = {"betas": RATES["betas"], "eps": RATES["eps"], "grad_clip": 0.5}
    return Optimizer(trained, grouping, **rates, accumulates=False), parameters


@pytest.mark.parametrize("switches", [False, True])
def test_an_optimizer_is_the_same_by_the_kernel_and_without_it(
    switches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, 16, generator=generator).bfloat16() for n in (16, 3, 70)]
    drawn = [[torch.randn(x.shape, generator=generator) for x in start] for _ in range(STEPS)]
    found = []
    for has_kernel in (False, True):
        optimizer, parameters = make_optimizer(start)
        for number, gradients in enumerate(drawn):
            # with another optimizer of the same tensors, which goes on the other way
            if switches and number == STEPS // 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer, parameters = make_optimizer([torch.zeros_like(x) for x in start])
                optimizer.load_state_dict(saved)
            is_on = has_kernel != (switches and number >= STEPS // 2)
            monkeypatch.setattr(adamw, "_has_kernel", lambda _, is_on=is_on: is_on)
            optimizer.backward(
                sum((p * g.bfloat16()).sum() for p, g in zip(parameters, gradients, strict=True))  # type: ignore[arg-type]
            )
            norm = math.hypot(*optimizer.clip().tolist())
            optimizer.step(1e-3, 0.1, is_finite=math.isfinite(norm))
        found.append(copy.deepcopy(optimizer.state_dict()))
    (values, moments), (other_values, other_moments) = ((x["values"], x["moments"]) for x in found)
    for name, value in values.items():
        # a few units of the last of the 24 bits
        close = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(other_values[name], value, **close)
        assert moments[name].keys() == other_moments[name].keys()
        for kind, moment in moments[name].items():
            torch.testing.assert_close(other_moments[name][kind], moment, **close)
