import importlib.util
import time
from collections.abc import Iterator

import pytest
import torch

from rwkv_peft.errors import BackendUnavailableError, ShapeError
from rwkv_peft.ops.dispatch import Request, select
from rwkv_peft.ops.testing import (
    DECAYS,
    assert_within_budget,
    run_wkv7,
    wkv7_case,
    wkv7_plain,
)
from rwkv_peft.ops.wkv7 import TABLE, wkv7
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_reference

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 100, 1000)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors are filled with NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_form_equals_the_recurrence_in_float64(T: int, decay: str) -> None:
    case = wkv7_case(T=T, decay=decay, dtype=torch.float64, N=16)
    exact, chunked = run_wkv7(case, wkv7_reference), run_wkv7(case, wkv7_chunked)
    for name in exact:
        error = (chunked[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 17, 100, 300])
def test_chunked_form_stays_within_the_error_budget(
    T: int, decay: str, dtype: torch.dtype, poisoned_memory: None
) -> None:
    case = wkv7_case(T=T, decay=decay, dtype=dtype)
    exact = run_wkv7(case.to(torch.float64), wkv7_reference)
    plain = run_wkv7(case, wkv7_plain)
    for name, value in run_wkv7(case, wkv7_chunked).items():
        assert_within_budget(value, exact[name], plain[name], name)


def test_reference_gradients_equal_finite_differences() -> None:
    case = wkv7_case(B=1, T=5, H=1, N=4, dtype=torch.float64)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b, case.initial_state]
    for x in inputs:
        assert x is not None
        x.requires_grad_()
    assert torch.autograd.gradcheck(wkv7_reference, inputs)


def test_chunked_gradients_equal_finite_differences() -> None:
    case = wkv7_case(B=1, T=35, H=1, N=2, dtype=torch.float64)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b, case.initial_state]
    for x in inputs:
        assert x is not None
        x.requires_grad_()
    assert torch.autograd.gradcheck(wkv7_chunked, inputs)


@pytest.mark.parametrize("split", [1, 31, 32, 50])
def test_two_runs_with_carried_state_equal_one(split: int) -> None:
    case = wkv7_case(T=100, dtype=torch.float64, N=16)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b]
    whole, last = wkv7(*inputs, initial_state=case.initial_state)
    first, middle = wkv7(*(x[:, :split] for x in inputs), initial_state=case.initial_state)
    second, end = wkv7(*(x[:, split:] for x in inputs), initial_state=middle)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    case = wkv7_case(B=3, T=40)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b]
    together, _ = wkv7(*inputs, initial_state=case.initial_state)
    assert case.initial_state is not None
    alone, _ = wkv7(*(x[1:2] for x in inputs), initial_state=case.initial_state[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_tokens_after_the_end_do_not_change_what_came_before() -> None:
    case = wkv7_case(T=40, dtype=torch.float64, N=16)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b]
    longer, _ = wkv7(*inputs)
    shorter, _ = wkv7(*(x[:, :37] for x in inputs))
    torch.testing.assert_close(longer[:, :37], shorter, rtol=1e-12, atol=1e-12)


def test_no_initial_state_is_a_state_of_zeros() -> None:
    case = wkv7_case(T=40)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b]
    zeros = torch.zeros(2, 2, 64, 64)
    for one, other in zip(wkv7(*inputs), wkv7(*inputs, initial_state=zeros), strict=True):
        assert torch.equal(one, other)


def test_the_same_call_twice_gives_the_same_bits() -> None:
    case = wkv7_case(T=100, dtype=torch.bfloat16)
    first, second = run_wkv7(case, wkv7_chunked), run_wkv7(case, wkv7_chunked)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_that_are_views_give_the_result_of_their_copies() -> None:
    case = wkv7_case(T=40)
    inputs = [case.r, case.w, case.k, case.v, case.a, case.b]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not views[0].is_contiguous()
    assert torch.equal(wkv7(*views)[0], wkv7(*inputs)[0])


def test_chunked_form_is_fifteen_times_as_fast_as_the_official_packages_loop() -> None:
    case = wkv7_case(B=1, T=512, H=4)
    seconds = {}
    for function, rounds in ((wkv7_plain, 2), (wkv7_chunked, 12)):
        run_wkv7(case, function)
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            run_wkv7(case, function)
            times.append(time.perf_counter() - started)
        seconds[function] = min(times)
    assert seconds[wkv7_plain] > 15 * seconds[wkv7_chunked]


def test_a_tensor_that_disagrees_is_named() -> None:
    case = wkv7_case(T=8)
    inputs = {name: getattr(case, name) for name in "rwkvab"}
    with pytest.raises(ShapeError, match=r"k must be like r.*float32.*got.*float16"):
        wkv7(**{**inputs, "k": case.k.half()})
    with pytest.raises(ShapeError, match=r"initial_state must be \(2, 2, 64, 64\)"):
        wkv7(**inputs, initial_state=torch.zeros(2, 64, 64))
    with pytest.raises(ShapeError, match="T >= 1"):
        wkv7(**{name: x[:, :0] for name, x in inputs.items()})


def test_auto_takes_the_chunked_form_on_a_cpu_and_says_why_not_others() -> None:
    choice = select("wkv7", TABLE, "auto", Request(torch.device("cpu"), torch.float32, 64))
    assert choice.name == "torch"
    assert "fla needs a GPU" in choice.reason


def test_a_backend_asked_for_by_name_that_cannot_serve_raises() -> None:
    request = Request(torch.device("cpu"), torch.float32, 64)
    with pytest.raises(BackendUnavailableError, match=r"op='fla' needs a GPU: use --op auto"):
        select("wkv7", TABLE, "fla", request)
    with pytest.raises(BackendUnavailableError, match=r"op='cuda' is not a backend.*torch"):
        select("wkv7", TABLE, "cuda", request)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "fla"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 16, 63, 100, 1000])
def test_gpu_backends_stay_within_the_error_budget(T: int, decay: str, backend: str) -> None:
    if backend == "fla" and importlib.util.find_spec("fla") is None:
        pytest.skip("needs the extra fla")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    case = wkv7_case(T=T, decay=decay, dtype=torch.bfloat16).to(torch.bfloat16, device)
    function = select("wkv7", TABLE, backend, Request(device, torch.bfloat16, 64)).function
    exact = run_wkv7(case.to(torch.float64), wkv7_reference)
    plain = run_wkv7(case, wkv7_plain)
    for name, value in run_wkv7(case, function).items():
        assert_within_budget(value, exact[name], plain[name], name)
