from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import rwkv_peft
from rwkv_peft.data.batching import Batch
from rwkv_peft.methods import Method
from rwkv_peft.methods.attach import attach
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.training.step import full_step
from tests.models.test_versions import VERSIONS, make_segment_ids

# the compiler asks every tensor for its gradient, and the warning of those that keep none is not
# shown outside of tests
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

METHODS: dict[Method, dict[str, Any]] = {"lora": {"r": 4}, "miss": {"r": 4}, "none": {}}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_batch(rows: int, length: int, *, packed: bool) -> Batch:
    drawn = torch.randint(0, 320, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    ids = make_segment_ids(rows, length) if packed else None
    return Batch(drawn[:, :-1], drawn[:, 1:], [1], segment_ids=ids)


def load(path: Path, method: Method, dtype: str = "float64") -> tuple[RWKV, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = rwkv_peft.load_model(path, dtype=dtype)
    trained = dict(attach(model, method, METHODS[method]))
    for parameter in trained.values():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train(), trained


def gradients(model: RWKV, trained: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    for parameter in trained.values():
        parameter.grad = None
    full_step(model, batch, divisor=batch.weight, l2wrap=1e-4, backward=torch.Tensor.backward)
    return {name: x.grad for name, x in trained.items() if x.grad is not None}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).norm() <= tolerance * x.norm(), name


@pytest.mark.parametrize(
    ("name", "method", "packed"),
    [
        pytest.param(
            name,
            method,
            packed,
            marks=[] if packed and (method == "lora" or name == "7") else pytest.mark.slow,
        )
        for name in ("5.2", "6", "7")
        for method in METHODS
        for packed in (True, False)
    ],
)
def test_a_compiled_block_has_the_gradients_of_the_plain_one(
    name: str, method: Method, packed: bool, make_model_file: Callable[..., Path]
) -> None:
    model, trained = load(make_model_file(**VERSIONS[name]), method)
    batch = make_batch(2, 70, packed=packed)
    plain = gradients(model, trained, batch)
    for grad_cp in (False, True):
        torch._dynamo.reset()
        model.grad_cp = grad_cp
        compile_blocks(model, backend="aot_eager")
        require_equal(gradients(model, trained, batch), plain, 1e-11)


def test_blocks_that_are_alike_share_their_code_for_each_of_many_lengths(
    make_model_file: Callable[..., Path],
) -> None:
    model, trained = load(make_model_file(n_layer=5), "lora")
    lengths = [70, 33, 64, *range(10, 18)]
    plain = {T: gradients(model, trained, make_batch(2, T, packed=True)) for T in lengths}
    compile_blocks(model, backend="aot_eager")
    for count, T in enumerate(lengths, 1):
        for _ in range(2):
            found = gradients(model, trained, make_batch(2, T, packed=True))
            require_equal(found, plain[T], 1e-11)
            # of the first block, which has a norm more, and of the others
            assert counters["stats"]["unique_graphs"] == 2 * count


def test_blocks_that_cannot_be_compiled_run_as_they_are_and_the_reason_is_told(
    make_model_file: Callable[..., Path],
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    model, trained = load(make_model_file(), "lora")
    batch, told = make_batch(2, 20, packed=True), []
    plain = gradients(model, trained, batch)
    compile_blocks(model, backend=broken, on_failure=told.append)  # type: ignore[arg-type]
    require_equal(gradients(model, trained, batch), plain, 0)
    assert len(told) == 1
    assert "no compiler here" in told[0]
    assert not model.is_compiled


@pytest.mark.slow
def test_the_compiler_itself_keeps_to_the_error_budget_of_float32(
    make_model_file: Callable[..., Path],
) -> None:
    path, batch = make_model_file(), make_batch(2, 70, packed=True)
    exact = gradients(*load(path, "lora"), batch)
    model, trained = load(path, "lora", "float32")
    plain = gradients(model, trained, batch)
    compile_blocks(model)
    compiled = gradients(model, trained, batch)
    for name, x in exact.items():
        error, other = ((found[name] - x).norm() for found in (compiled, plain))
        assert error <= 2 * other + 1e-7 * x.norm(), name
