"""The Triton kernels in Triton's interpreter, on the CPU; `test_triton` runs this file.

A process of its own, since the interpreter is chosen when Triton is imported.
"""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from rwkv_peft.errors import ShapeError
from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import DECAYS, Case, run
from rwkv_peft.ops.dequantise.triton import dequantise_triton
from tests.ops import test_dequantise

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# a package has the shared module `ops.triton` under the name of its own
MODULES = {op: import_module(f"rwkv_peft.ops.{op}.triton") for op in OPERATORS}
FUNCTIONS = {op: getattr(module, f"{op}_triton") for op, module in MODULES.items()}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    (FP32, 1, "trained", False, True),
    (FP32, 17, "mixed", False, False),
    (FP32, 64, "fastest", False, True),
    (FP32, 64, "none", True, True),
    *((FP32, 65, decay, True, True) for decay in DECAYS),
    (FP16, 65, "extreme", True, True),
    (BF16, 1, "trained", False, True),
    # not 'fastest': the interpreter cuts bf16 off instead of rounding it
    (BF16, 65, "mixed", True, True),
]


def check(op: str, function: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Tensor]:
    """The results of a function, once they are held against the budget."""
    operator = OPERATORS[op]
    exact, baseline = run(case.to(torch.float64), operator.reference), run(case, operator.baseline)
    found = run(case, function)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert_within_budget(value, exact[name], baseline[name], name)
    return found


@pytest.mark.parametrize(("dtype", "T", "decay", "packed", "has_state"), CASES)
@pytest.mark.parametrize("op", OPERATORS)
def test_kernels_stay_within_the_error_budget(
    op: str, dtype: torch.dtype, T: int, decay: str, packed: bool, has_state: bool
) -> None:
    shape = {"B": 1, "T": T, "H": 1}
    case = OPERATORS[op].make_case(
        **shape, decay=decay, packed=packed, has_state=has_state, dtype=dtype
    )
    check(op, FUNCTIONS[op], case)


@pytest.mark.parametrize("op", OPERATORS)
def test_rows_and_heads_are_kept_apart_and_the_bits_are_the_same_twice(op: str) -> None:
    case = OPERATORS[op].make_case(B=2, T=20, H=2, packed=True)
    found = check(op, FUNCTIONS[op], case)
    for name, value in run(case, FUNCTIONS[op]).items():
        assert torch.equal(found[name], value), name


def test_the_chunks_that_wkv7_has_for_bf16_stay_within_the_error_budget() -> None:
    module = MODULES["wkv7"]
    settings = module.settings_for(BF16)._replace(chunk=64)
    function = module.register("interpreted", module.stages(lambda dtype: settings))
    case = OPERATORS["wkv7"].make_case(B=1, T=100, H=1, packed=True, dtype=BF16)
    check("wkv7", function, case)


@pytest.mark.parametrize("op", OPERATORS)
def test_another_head_size_is_named(op: str) -> None:
    case = OPERATORS[op].make_case(B=1, T=4, H=1, N=32)
    with pytest.raises(ShapeError, match="op='triton' needs head size 64, got 32: use --op torch"):
        run(case, FUNCTIONS[op])


def test_stored_weights_become_dense_with_the_bits_of_the_form_in_pytorch() -> None:
    # the interpreter cuts bf16 off instead of rounding it
    test_dequantise.check(dequantise_triton, dtypes=(FP32, FP16))
