"""The Triton kernels in Triton's interpreter, on the CPU; `test_triton` runs this file.

A process of its own, since the interpreter is chosen when Triton is imported.
"""

import pytest
import torch

from rwkv_peft.errors import ShapeError
from rwkv_peft.ops.testing import DECAYS, OPERATORS, assert_within_budget, run
from rwkv_peft.ops.wkv7.triton import wkv7_triton

FUNCTIONS = {"wkv7": wkv7_triton}


@pytest.mark.parametrize(
    ("T", "decay", "packed", "has_state"),
    [
        (1, "trained", False, True),
        (17, "mixed", False, False),
        (64, "fastest", False, True),
        (64, "none", True, True),
        *((65, decay, True, True) for decay in DECAYS),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_kernels_stay_within_the_error_budget(
    op: str, dtype: torch.dtype, T: int, decay: str, packed: bool, has_state: bool
) -> None:
    operator = OPERATORS[op]
    case = operator.make_case(
        B=1, T=T, H=1, decay=decay, packed=packed, has_state=has_state, dtype=dtype
    )
    exact, plain = run(case.to(torch.float64), operator.reference), run(case, operator.plain)
    first, second = run(case, FUNCTIONS[op]), run(case, FUNCTIONS[op])
    for name, value in first.items():
        assert_within_budget(value, exact[name], plain[name], name)
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("op", FUNCTIONS)
def test_another_head_size_is_named(op: str) -> None:
    case = OPERATORS[op].make_case(B=1, T=4, H=1, N=32)
    with pytest.raises(ShapeError, match="op='triton' needs head size 64, got 32: use --op torch"):
        run(case, FUNCTIONS[op])
