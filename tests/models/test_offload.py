"""Inputs of blocks that wait on the host give the bits of those that stay."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rwkv_peft.device import own_stream
from rwkv_peft.loss import head_loss
from rwkv_peft.methods import Method
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.models.offload import HostStore
from rwkv_peft.training.graphs import GraphedStep
from tests.models.test_compile import load, make_batch
from tests.models.test_versions import VERSIONS
from tests.training.test_graphs import BACKWARD
from tests.training.test_graphs import load as load_on_gpu
from tests.training.test_graphs import make_batch as make_captured

# see tests/models/test_compile.py
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def note_inputs(model: RWKV) -> list[StorageWeakRef]:
    """Has a model note the memory of what its blocks are given from now on."""
    found: list[StorageWeakRef] = []
    run_block = model.run_block

    def run(block: Any, x: Tensor, *others: Any) -> Any:
        found.append(StorageWeakRef(x.untyped_storage()))
        return run_block(block, x, *others)

    model.run_block = run  # type: ignore[method-assign]
    return found


def learn(model: RWKV, trained: dict[str, Tensor], *, packed: bool) -> tuple[list[Tensor], int]:
    """All gradients, and how many inputs of blocks are there when backward begins."""
    for parameter in trained.values():
        parameter.grad = None
    batch, inputs = make_batch(2, 70, packed=packed), note_inputs(model)
    hidden, layers = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
    sums = head_loss(model.head, hidden.flatten(0, 1), batch.targets.flatten())
    del hidden, layers
    there = sum(not x.expired() for x in inputs)
    sums.objective.backward()
    assert len(inputs) == len(model.blocks)
    assert all(x.expired() for x in inputs)
    return [x.grad for x in trained.values() if x.grad is not None], there


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("name", "method", "packed"), [("7", "lora", True), ("6", "none", False), ("5.2", "miss", True)]
)
def test_no_bit_is_another_and_no_input_stays_on_the_device(
    name: str,
    method: Method,
    packed: bool,
    is_compiled: bool,
    make_model_file: Callable[..., Path],
) -> None:
    model, trained = load(make_model_file(**{**VERSIONS[name], "n_layer": 4}), method)
    if is_compiled:
        compile_blocks(model, backend="aot_eager")
    found = {}
    model.grad_cp = True
    for grad_cp in (1, 2):
        model.host = HostStore() if grad_cp == 2 else None
        found[grad_cp] = [learn(model, trained, packed=packed) for _ in range(2)]
    for (one, kept), (other, left) in zip(found[1], found[2], strict=True):
        assert len(one) == len(other) > 0
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert (kept, left) == (4, 0)


def test_memory_of_the_host_is_used_again(make_model_file: Callable[..., Path]) -> None:
    model, trained = load(make_model_file(n_layer=3), "lora")
    model.grad_cp, model.host = True, HostStore()
    addresses = []
    for _ in range(3):
        learn(model, trained, packed=False)
        # a forward without a backward gives it back too
        model.hidden(torch.ones(2, 70, dtype=torch.long))
        (free,) = model.host._free.values()
        addresses.append(sorted(x.data_ptr() for x in free))
    assert len(addresses[0]) == 3
    assert addresses[1:] == addresses[:2]


def test_what_is_kept_is_what_it_was_though_memory_is_used_again() -> None:
    store = HostStore()
    one, two = torch.arange(6.0).view(2, 3), torch.randn(5)
    first = store.keep(one)
    second = store.keep(two)
    one.zero_()
    assert torch.equal(first.fetch(), torch.arange(6.0).view(2, 3))
    del first
    # of another shape and dtype, in the memory of the first
    third = store.keep(torch.arange(4))
    assert torch.equal(second.fetch(), two) and torch.equal(third.fetch(), torch.arange(4))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "is_compiled"), [("lora", False), ("none", False), ("lora", True)]
)
def test_on_a_gpu_too_captured_steps_have_the_bits_of_inputs_that_stay(
    method: str, is_compiled: bool, make_model_file: Callable[..., Path]
) -> None:
    device = torch.device("cuda")
    path = make_model_file(n_layer=8, n_embd=256, dim_att=256, dim_ffn=1024)
    model, trained = load_on_gpu(path, method)
    if is_compiled:
        compile_blocks(model)
    batches = [make_captured(2, 1024, packed=True, share=0.1, seed=seed) for seed in range(6)]
    found: dict[int, list[Tensor]] = {}
    peaks = []
    model.grad_cp = True
    for grad_cp in (1, 2):
        model.host = HostStore() if grad_cp == 2 else None
        for parameter in trained.values():
            parameter.grad = None
        with own_stream(device):
            step, found[grad_cp] = GraphedStep(device, 1024), []
            for i, batch in enumerate(batches):
                if i == 2:
                    # from here on it is captured
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                step(model, batch, state=None, divisor=batch.weight, l2wrap=1e-3, backward=BACKWARD)
                grads = [x.grad for x in trained.values() if x.grad is not None]
                found[grad_cp].append(torch.cat([x.flatten() for x in grads]).cpu())
                torch._foreach_zero_(grads)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            assert step.num_graphs == 1
    for one, other in zip(found[1], found[2], strict=True):
        assert one.isfinite().all() and one.any()
        assert torch.equal(one, other)
    # 8 inputs of 2 x 1024 x 256 numbers of bf16, of which backward has one at a time
    assert peaks[0] - peaks[1] >= 6 * 2**20
