"""AdamW in one pass: interpreted, compiled for several GPUs, and on a GPU."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rwkv_peft.ops import adamw
from rwkv_peft.training.halves import join, split
from tests.processes import run_interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)


def test_the_kernel_gives_right_results_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_the_kernel_compiles_for_several_gpus(target: tuple[Any, ...]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for launcher, arguments in adamw.variants():
        signature = dict(zip(launcher.kernel.arg_names, arguments, strict=True))
        constants = {name: x for name, x in signature.items() if not isinstance(x, str)}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(launcher.kernel, signature, constants)
        assert compile(source, GPUTarget(*target), launcher.options).metadata.shared == 0


@pytest.mark.gpu
def test_on_a_gpu_steps_of_many_rates_are_those_of_pytorch_and_compile_once() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    torch.manual_seed(0)
    start = torch.randn(100_000, device=device)
    high, low = torch.empty_like(start).bfloat16(), torch.empty_like(start).to(torch.int16)
    split(start.clone(), high, low)
    master, plain, exact = (nn.Parameter(x) for x in (start, start.clone(), start.double()))
    own, others, right = (
        torch.optim.AdamW([x], betas=(0.9, 0.99), weight_decay=0.1, fused=True)
        for x in (master, plain, exact)
    )
    assert adamw.steps_in_place(own, device)
    known = len(adamw.launcher()._found)
    for number in range(20):
        gradient = torch.randn_like(start).bfloat16()
        for optimizer in (own, others, right):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + number)
        adamw.step_in_place(own, master, high, low, gradient, None)
        for x, optimizer in ((plain, others), (exact, right)):
            x.grad = gradient.to(x.dtype)
            optimizer.step()
        error, usual = ((x.double() - exact).abs().max() for x in (join(high, low), plain))
        assert error <= 1.5 * usual
    assert len(adamw.launcher()._found) <= known + 1
