"""What holds for the recurrences of all versions and every backend that runs here."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from rwkv_peft.errors import BackendUnavailableError, ShapeError
from rwkv_peft.ops import OPERATORS, Operator
from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import DECAYS, Case, make_segment_ids, make_wkv6_case, make_wkv7_case, run
from rwkv_peft.ops.dispatch import Request, select
from rwkv_peft.ops.wkv6 import TABLE as WKV6
from rwkv_peft.ops.wkv6 import wkv6
from rwkv_peft.ops.wkv7 import TABLE as WKV7
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_baseline

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 100, 1000, pytest.param(4096, marks=pytest.mark.slow))
CPU = torch.device("cpu")


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]


def part(case: Case, rows: Any = slice(None), times: Any = slice(None)) -> list[torch.Tensor]:
    """The inputs of some rows and tokens; u belongs to all."""
    return [x if n == "u" else x[rows][:, times] for n, x in case.inputs.items()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_form_equals_the_recurrence_in_float64(
    T: int, decay: str, packed: bool, operator: Operator
) -> None:
    case = operator.make_case(T=T, decay=decay, packed=packed, dtype=torch.float64, N=16)
    exact, chunked = run(case, operator.reference), run(case, operator.chunked)
    for name in exact:
        # a gradient may vanish, as that of an extreme decay does
        scale = max(exact[name].abs().max().item(), 1e-20)
        assert (chunked[name] - exact[name]).abs().max().item() < 1e-12 * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 17, 100, 300])
def test_chunked_form_stays_within_the_error_budget(
    T: int,
    decay: str,
    packed: bool,
    dtype: torch.dtype,
    operator: Operator,
    poisoned_memory: None,
) -> None:
    case = operator.make_case(T=T, decay=decay, packed=packed, dtype=dtype)
    exact = run(case.to(torch.float64), operator.reference)
    baseline = run(case, operator.baseline)
    for name, value in run(case, operator.chunked).items():
        assert_within_budget(value, exact[name], baseline[name], name)


def documents(case: Case) -> Iterator[tuple[slice, slice, Case]]:
    """Rows and tokens of each document of a packed case, and the document as a case of its own.

    The state that is given belongs to a row's first document, the one that comes out to its last.
    """
    assert case.segment_ids is not None and case.initial_state is not None
    B, T = case.segment_ids.shape
    for row in range(B):
        begin = 0
        ids = case.segment_ids[row].tolist()
        for end in [t for t in range(1, T + 1) if t == T or ids[t] != ids[t - 1]]:
            rows, times = slice(row, row + 1), slice(begin, end)
            part = case.select(rows, times)
            yield (
                rows,
                times,
                replace(
                    part,
                    initial_state=part.initial_state if begin == 0 else None,
                    dstate=part.dstate if end == T else torch.zeros_like(part.dstate),
                    segment_ids=None,
                ),
            )
            begin = end


@pytest.mark.parametrize("form", ["reference", "chunked", "baseline"])
@pytest.mark.parametrize("decay", ["trained", "extreme"])
def test_packed_documents_equal_the_same_ones_by_one(
    decay: str, form: str, operator: Operator
) -> None:
    case = operator.make_case(B=3, T=170, decay=decay, packed=True, dtype=torch.float64, N=8)
    packed = run(case, getattr(operator, form))
    alone = {name: torch.full_like(x, torch.nan) for name, x in packed.items()}
    if "du" in alone:
        alone["du"].zero_()
    num = 0
    for rows, times, document in documents(case):
        num += 1
        for name, x in run(document, operator.reference).items():
            if name == "du":
                alone[name] += x
            elif name == "dinitial_state" or (name == "state" and times.stop == 170):
                alone[name][rows] = x
            elif name != "state":
                alone[name][rows, times] = x
    assert num > 9
    for name, expected in alone.items():
        scale = max(expected.abs().max().item(), 1e-20)
        assert (packed[name] - expected).abs().max().item() < 1e-12 * scale, name


def test_a_document_does_not_see_the_ones_beside_it(operator: Operator) -> None:
    case, other = (
        operator.make_case(B=2, T=100, N=16, packed=True, dtype=torch.float64, seed=seed)
        for seed in (0, 1)
    )
    before = run(case, operator.chunked)
    names = ["y", *(f"d{name}" for name in case.inputs if name != "u")]
    for rows, times, _ in list(documents(case))[::3]:
        changed = {name: x.clone() for name, x in case.inputs.items()}
        for name in case.inputs.keys() - {"u"}:
            changed[name][rows, times] = other.inputs[name][rows, times]
        after = run(replace(case, inputs=changed), operator.chunked)
        others = torch.ones(2, 100, dtype=torch.bool)
        others[rows, times] = False
        for name in names:
            # decays are multiplied across documents and rounded on the way
            difference = (before[name] - after[name]).abs()[others].max()
            assert difference < 1e-13 * before[name].abs().max(), name
        assert (before["y"] - after["y"])[rows, times].abs().min() > 0


@pytest.mark.parametrize(("T", "N", "form"), [(5, 4, "reference"), (35, 2, "chunked")])
def test_gradients_equal_finite_differences(T: int, N: int, form: str, operator: Operator) -> None:
    case = operator.make_case(B=1, T=T, H=1, N=N, dtype=torch.float64)
    inputs = [*case.inputs.values(), case.initial_state]
    for x in inputs:
        assert x is not None
        x.requires_grad_()
    form_of = getattr(operator, form)
    assert torch.autograd.gradcheck(lambda *x: form_of(*x, None), inputs)


@pytest.mark.parametrize("split", [1, 31, 32, 50])
def test_two_runs_with_carried_state_equal_one(split: int, operator: Operator) -> None:
    case = operator.make_case(T=100, dtype=torch.float64, N=16)
    f, state = operator.function, case.initial_state
    whole, last = f(*part(case), initial_state=state)
    first, middle = f(*part(case, times=slice(split)), initial_state=state)
    second, end = f(*part(case, times=slice(split, None)), initial_state=middle)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_rows_of_a_batch_do_not_touch_each_other(operator: Operator) -> None:
    case = operator.make_case(B=3, T=40)
    assert case.initial_state is not None
    together, _ = operator.function(*part(case), initial_state=case.initial_state)
    row = slice(1, 2)
    alone, _ = operator.function(*part(case, row), initial_state=case.initial_state[row])
    torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_tokens_after_the_end_do_not_change_what_came_before(operator: Operator) -> None:
    case = operator.make_case(T=40, dtype=torch.float64, N=16)
    longer, _ = operator.function(*part(case))
    shorter, _ = operator.function(*part(case, times=slice(37)))
    torch.testing.assert_close(longer[:, :37], shorter, rtol=1e-12, atol=1e-12)


def test_no_initial_state_is_a_state_of_zeros(operator: Operator) -> None:
    case = operator.make_case(T=40)
    zeros = torch.zeros(2, 2, 64, 64)
    pairs = zip(
        operator.function(*part(case)),
        operator.function(*part(case), initial_state=zeros),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_same_call_twice_gives_the_same_bits(operator: Operator) -> None:
    case = operator.make_case(T=100, dtype=torch.bfloat16)
    first, second = run(case, operator.chunked), run(case, operator.chunked)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_that_are_views_give_the_result_of_their_copies(operator: Operator) -> None:
    case = operator.make_case(T=40)
    views = [
        x if x.ndim == 2 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in part(case)
    ]
    assert not views[0].is_contiguous()
    assert torch.equal(operator.function(*views)[0], operator.function(*part(case))[0])


def test_chunked_wkv7_is_fifteen_times_as_fast_as_the_official_packages_loop() -> None:
    case = make_wkv7_case(B=1, T=512, H=4)
    seconds = {}
    for function, rounds in ((wkv7_baseline, 2), (wkv7_chunked, 12)):
        run(case, function)
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            run(case, function)
            times.append(time.perf_counter() - started)
        seconds[function] = min(times)
    assert seconds[wkv7_baseline] > 15 * seconds[wkv7_chunked]


def test_a_tensor_that_disagrees_is_named(operator: Operator) -> None:
    case = operator.make_case(T=8)
    inputs = case.inputs
    with pytest.raises(ShapeError, match=r"k must be like r.*float32.*got.*float16"):
        operator.function(**{**inputs, "k": inputs["k"].half()})
    with pytest.raises(ShapeError, match=r"initial_state must be \(2, 2, 64, 64\)"):
        operator.function(**inputs, initial_state=torch.zeros(2, 64, 64))
    with pytest.raises(ShapeError, match=r"segment_ids must be \(2, 8\) torch.int32 on cpu, got"):
        operator.function(**inputs, segment_ids=make_segment_ids(2, 8).long())
    with pytest.raises(ShapeError, match=r"segment_ids must be \(2, 8\) torch.int32 on cpu, got"):
        operator.function(**inputs, segment_ids=make_segment_ids(1, 8))
    with pytest.raises(ShapeError, match="T >= 1"):
        operator.function(*part(case, times=slice(0)))


def test_own_key_weights_of_another_shape_are_named() -> None:
    case = make_wkv6_case(T=8)
    with pytest.raises(ShapeError, match=r"u must be \(2, 64\), got \(2, 8\)"):
        wkv6(**{**case.inputs, "u": case.inputs["u"][:, :8]})


def test_auto_takes_the_chunked_form_on_a_cpu_and_says_why_not_others() -> None:
    for table in (WKV6, WKV7):
        choice = select("wkv", table, "auto", Request(CPU, torch.float32, 64))
        assert choice.name == "torch"
    assert "fla needs a GPU" in choice.reason


def test_a_backend_asked_for_by_name_that_cannot_serve_raises() -> None:
    request = Request(CPU, torch.float32, 64)
    with pytest.raises(BackendUnavailableError, match=r"op='fla' needs a GPU: use --op auto"):
        select("wkv7", WKV7, "fla", request)
    with pytest.raises(BackendUnavailableError, match=r"op='tpu' is not a backend.*torch"):
        select("wkv7", WKV7, "tpu", request)
