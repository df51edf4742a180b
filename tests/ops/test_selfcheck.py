"""The check of a kernel before training, given kernels that are wrong on purpose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft.models
from rwkv_peft.errors import BackendUnavailableError, TrainingError
from rwkv_peft.models import rwkv7
from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.dispatch import Backend, Choice, Request, select
from rwkv_peft.ops.selfcheck import check, require_right
from rwkv_peft.ops.wkv7 import TABLE
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Results = tuple[Tensor, Tensor]


class Scaled(torch.autograd.Function):
    """Its input, with a gradient that is too large by a twentieth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.05


def forgets_state(*given: Any) -> Results:
    return wkv7_chunked(*given[:6], None if given[6] is None else given[6] * 0, given[7])


def forgets_borders(*given: Any) -> Results:
    return wkv7_chunked(*given[:7], None)


def wrong_gradient(r: Tensor, w: Tensor, *given: Any) -> Results:
    return wkv7_chunked(r, Scaled.apply(w), *given)


def unwritten_token(*given: Any) -> Results:
    y, state = wkv7_chunked(*given)
    return torch.cat((y[:, :-1], y[:, -1:] * float("nan")), 1), state


def transposed_state(*given: Any) -> Results:
    y, state = wkv7_chunked(*given)
    return y, state.mT


def fails(*given: Any) -> Results:
    raise RuntimeError("CUDA error: an illegal memory access\nand more lines")


def choice(function: Callable[..., Any], others: tuple[str, ...] = ("triton", "torch")) -> Choice:
    return Choice("wkv7", "cuda", function, "", others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_right_kernel_passes(operator: str, packed: bool, dtype: torch.dtype) -> None:
    request = Request(CPU, dtype, 64)
    chosen = select(operator, OPERATORS[operator].table, "torch", request)
    assert check(chosen, request, packed=packed).has_passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "packed", "wrong"),
    [
        (forgets_state, False, "y"),
        (forgets_borders, True, "y"),
        (wrong_gradient, False, "dw"),
        (unwritten_token, False, "y"),
        (transposed_state, False, "state"),
    ],
)
def test_a_wrong_kernel_is_found(
    kernel: Callable[..., Any], packed: bool, wrong: str, dtype: torch.dtype
) -> None:
    found = check(choice(kernel), Request(CPU, dtype, 64), packed=packed)
    assert not found.has_passed
    error, allowed = found.errors[wrong]
    assert error > allowed


def test_a_wrong_kernel_stops_with_figures_and_the_next_backend() -> None:
    request = Request(CPU, torch.float32, 64)
    with pytest.raises(
        TrainingError,
        match=r"^op='cuda' computes wkv7 wrongly on this device in float32: dw is off by \d\.\d"
        r"e-\d+, \d\.\de-\d+ is allowed; use --op triton$",
    ):
        require_right(choice(wrong_gradient), request)
    with pytest.raises(TrainingError, match=r"no other backend can serve.*use --accelerator cpu"):
        require_right(choice(wrong_gradient, ()), request)


def test_a_kernel_that_does_not_run_is_told_in_one_line() -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        require_right(choice(fails), Request(CPU, torch.float32, 64))
    assert str(raised.value) == (
        "op='cuda' does not run on cpu: CUDA error: an illegal memory access; use --op triton"
    )


def test_the_plain_forms_are_not_checked_on_a_cpu_where_the_tests_prove_them() -> None:
    request = Request(CPU, torch.float32, 64)
    for name in ("torch", "reference"):
        assert require_right(select("wkv7", TABLE, name, request), request) is None


def test_tf32_is_off_while_checking_and_back_afterwards() -> None:
    seen = []

    def spy(*given: Any) -> Results:
        seen.append(torch.get_float32_matmul_precision())
        return wkv7_chunked(*given)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(choice(spy), Request(CPU, torch.float32, 64))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


@pytest.mark.parametrize("kernel", [wkv7_chunked, wrong_gradient])
def test_a_run_checks_its_kernel_before_it_begins(
    kernel: Callable[..., Any],
    model_file: Path,
    data_file: Path,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = Backend("stub", lambda: kernel, lambda request: None, "of this test")
    version = replace(rwkv7.VERSION, backends=(row, *rwkv7.VERSION.backends))
    monkeypatch.setattr(rwkv_peft.models, "VERSIONS", (version,))
    folder = tmp_path / "out"
    flags = ["--accelerator", "cpu", "--precision", "fp32", "--ctx_len", 16, "--epoch_count", 1]
    done = cli("train", model_file, data_file, "--proj_dir", folder, *flags)
    if kernel is wkv7_chunked:
        assert done.code == 0
        log = (folder / "train_log.txt").read_text()
        assert "check: op stub agrees with the float64 reference in float32 on 83 tokens: " in log
    else:
        assert done.code == 2 and done.err.startswith("error: op='stub' computes wkv7 wrongly")
        assert done.err.endswith("use --op torch\n") and not folder.exists()
