"""Every backend of every operator on a GPU, over types, lengths, decays and packed rows.

Exact values come from the float64 recurrence, token by token, whose time is that of its launches:
all decays are rows of one batch, and its results serve every backend.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import DECAYS, Case, join_cases, run
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.fla import cap_autotuning
from rwkv_peft.ops.wkv7.cuda import KERNELS, operator

# the filter: operations without a deterministic form say so, fla and Triton speak of their future
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LENGTHS = (1, 15, 16, 17, 63, 100, 1000, 4096)
PERSISTENT = ("wkv7", "persistent")  # the form of the CUDA kernels that small cases are not given
BACKENDS = [
    *((op, backend.name) for op in OPERATORS for backend in OPERATORS[op].table),
    PERSISTENT,
]


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors are filled with NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8, device=device()).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def load(
    op: str, name: str, dtype: torch.dtype
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The function of a backend; skips what it says it cannot serve."""
    if (op, name) == PERSISTENT:
        return load_persistent(dtype)
    backend = next(b for b in OPERATORS[op].table if b.name == name)
    if (why := backend.objection(Request(device(), dtype, 64))) is not None:
        pytest.skip(f"{name} {why}")
    function = backend.load()
    if name == "fla":
        cap_autotuning(2)
    return function


def load_persistent(dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    load("wkv7", "cuda", dtype)
    if KERNELS.chunk_length(dtype, device()) != 64:
        pytest.skip("runs in bf16, in chunks of 64 tokens")
    return operator("persistent_everywhere", KERNELS.load, KERNELS.chunk_length, lambda plan: True)


def make_case(op: str, dtype: torch.dtype, T: int, packed: bool) -> Case:
    """A row for each decay."""
    cases = [
        OPERATORS[op].make_case(B=1, T=T, H=2, decay=decay, packed=packed, dtype=dtype, seed=seed)
        for seed, decay in enumerate(DECAYS)
    ]
    return join_cases(cases).to(dtype, device())


@functools.lru_cache(maxsize=2)
def expected(
    op: str, dtype: torch.dtype, T: int, packed: bool
) -> tuple[Case, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A case, its exact results and those of the same maths in the type of the inputs."""
    case = make_case(op, dtype, T, packed)
    exact = run(case.to(torch.float64, device()), OPERATORS[op].reference)
    baseline = run(case, OPERATORS[op].baseline)
    return case, detached(exact), detached(baseline)


def detached(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.detach() for name, x in results.items()}


# the backend comes last, so that it changes first and finds what was computed for the one before
@pytest.mark.parametrize("name", BACKENDS, ids="-".join)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_stays_within_the_error_budget(
    dtype: str, packed: bool, T: int, name: tuple[str, str]
) -> None:
    op, backend = name
    function = load(op, backend, DTYPES[dtype])
    case, exact, baseline = expected(op, DTYPES[dtype], T, packed)
    found = detached(run(case, function))
    for key, value in found.items():
        if key == "du":  # of all rows
            assert_within_budget(value, exact[key], baseline[key], key)
            continue
        for row, decay in enumerate(DECAYS):
            where = f"{key} of decay '{decay}'"
            assert_within_budget(value[row], exact[key][row], baseline[key][row], where)


@pytest.mark.parametrize("name", BACKENDS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_the_same_call_gives_the_same_bits(packed: bool, dtype: str, name: tuple[str, str]) -> None:
    op, backend = name
    function = load(op, backend, DTYPES[dtype])
    case = make_case(op, DTYPES[dtype], 300, packed)
    run(case, function)  # whatever is tuned is tuned now
    first = run(case, function)
    for _ in range(5):
        second = run(case, function)
        for key, value in first.items():
            assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", BACKENDS, ids="-".join)
def test_views_and_no_initial_state_are_served(name: tuple[str, str]) -> None:
    op, backend = name
    function = load(op, backend, torch.bfloat16)
    case = make_case(op, torch.bfloat16, 100, packed=False)
    inputs = list(case.inputs.values())
    views = [x if x.ndim == 2 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not views[0].is_contiguous()
    zeros = torch.zeros(len(DECAYS), 2, 64, 64, device=device())
    with torch.no_grad():
        y, state = function(*inputs, zeros, None)
        for others in (function(*views, zeros, None), function(*inputs, None, None)):
            assert torch.equal(others[0], y)
            assert torch.equal(others[1], state)
