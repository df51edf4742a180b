"""The six stages of WKV-7: their formulas, and what PyTorch knows of an operator made of them."""

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import DECAYS, Case, make_wkv7_case, run
from rwkv_peft.ops.wkv7.reference import wkv7_baseline, wkv7_reference
from rwkv_peft.ops.wkv7.stages import register
from tests.ops.torch_stages import torch_stages

wkv7_16 = register("formulas_16", torch_stages(chunk=16))
wkv7_64 = register("formulas_64", torch_stages(chunk=64))
wkv7_rounded = register("rounded", torch_stages(64, torch.bfloat16, torch.bfloat16))
FORWARD = torch.ops.rwkv_peft.wkv7_formulas_16.default
BACKWARD = torch.ops.rwkv_peft.wkv7_formulas_16_backward.default


def arguments(case: Case) -> list[Tensor | None]:
    return [*case.inputs.values(), case.initial_state, case.segment_ids]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 17, 64, 200])
def test_the_stages_equal_the_recurrence_in_float64(
    T: int, decay: str, packed: bool, poisoned_memory: None
) -> None:
    for has_state in (True, False):
        case = make_wkv7_case(
            T=T, decay=decay, packed=packed, has_state=has_state, dtype=torch.float64, N=16
        )
        exact = run(case, wkv7_reference)
        for function in (wkv7_16, wkv7_64):
            for name, value in run(case, function).items():
                # of one token and no state the decays have no gradient; what is left is rounding
                scale = max(exact[name].abs().max().item(), 1e-3)
                assert (value - exact[name]).abs().max().item() < 1e-12 * scale, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_products_and_stores_in_bf16_stay_within_the_error_budget(decay: str, packed: bool) -> None:
    case = make_wkv7_case(T=200, decay=decay, packed=packed, dtype=torch.bfloat16)
    exact, baseline = run(case.to(torch.float64), wkv7_reference), run(case, wkv7_baseline)
    for name, value in run(case, wkv7_rounded).items():
        assert_within_budget(value, exact[name], baseline[name], name)


@pytest.mark.parametrize("packed", [False, True])
def test_pytorch_finds_nothing_wrong_with_the_operators(packed: bool) -> None:
    case = make_wkv7_case(B=1, T=20, N=4, packed=packed, dtype=torch.float64)
    inputs = [None if x is None else x.detach() for x in arguments(case)]
    for x in inputs[:7]:
        assert x is not None
        x.requires_grad_()
    torch.library.opcheck(FORWARD, (*inputs, True))
    _, last_state, states, inverse = FORWARD(*inputs, True)
    given = (*inputs[:6], inputs[7], last_state, states, inverse, case.dy, case.dstate)
    torch.library.opcheck(BACKWARD, tuple(x if x is None else x.detach() for x in given))


def test_a_compiled_call_gives_what_the_call_gives() -> None:
    case = make_wkv7_case(T=20, N=4, packed=True)
    compiled = torch.compile(wkv7_16, backend="aot_eager", fullgraph=True)
    called, found = run(case, wkv7_16), run(case, compiled)
    for name, value in called.items():
        assert torch.equal(found[name], value), name


def test_without_gradients_nothing_is_kept() -> None:
    case = make_wkv7_case(T=40, N=4)
    y, state, states, inverse = FORWARD(*arguments(case), True)
    assert states.shape == (2, 2, 3, 4, 4) and inverse.shape == (2, 2, 3, 16, 16)
    y_alone, state_alone, *kept = FORWARD(*arguments(case), False)
    assert torch.equal(y_alone, y) and torch.equal(state_alone, state)
    assert [x.numel() for x in kept] == [0, 0]


@pytest.mark.parametrize("result", [0, 1])
def test_a_loss_of_one_result_alone_gives_its_gradients(result: int) -> None:
    case = make_wkv7_case(T=20, N=4, dtype=torch.float64)
    found = {}
    for function in (wkv7_reference, wkv7_16):
        inputs = [x.detach().requires_grad_() for x in arguments(case)[:7] if x is not None]
        loss = (function(*inputs, None)[result] * (case.dy, case.dstate)[result]).sum()
        found[function] = torch.autograd.grad(loss, inputs, materialize_grads=True)
    for got, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_views_give_the_result_of_their_copies() -> None:
    case = make_wkv7_case(T=20, N=4)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs.values()]
    assert not views[0].is_contiguous()
    copies = wkv7_16(*case.inputs.values(), None, None)
    for found, expected in zip(wkv7_16(*views, None, None), copies, strict=True):
        assert torch.equal(found, expected)


def test_inputs_that_need_no_gradients_leave_no_graph() -> None:
    case = make_wkv7_case(T=20, N=4)
    given = arguments(case)
    y, last_state = wkv7_16(*given)
    assert not y.requires_grad and not last_state.requires_grad
    with torch.no_grad():
        for found, expected in zip(wkv7_16(*given), (y, last_state), strict=True):
            assert torch.equal(found, expected)


def test_a_transform_of_functions_sees_the_operator() -> None:
    case = make_wkv7_case(T=20, N=4)
    r, *others = case.inputs.values()
    y, _ = wkv7_16(r, *others, None, None)
    mapped = torch.func.vmap(lambda x: wkv7_16(x, *others, None, None)[0])
    assert torch.equal(mapped(torch.stack((r, r))), torch.stack((y, y)))


def test_a_second_derivative_is_refused() -> None:
    case = make_wkv7_case(T=20, N=4)
    r, *others = (x.detach().requires_grad_() for x in case.inputs.values())
    y, _ = wkv7_16(r, *others, None, None)
    (dr,) = torch.autograd.grad((y * y).sum(), r, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dr.sum().backward()
