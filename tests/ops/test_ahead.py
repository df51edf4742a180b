"""Weights made dense ahead of their products: the same numbers, one after the other."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.methods.attach import attach
from rwkv_peft.ops.dequantise import ahead, dequantise
from rwkv_peft.ops.dequantise.ahead import begin_recurrence, follow_order, make_dense, note_order
from rwkv_peft.quant import Storage, quantise, stored_layers
from tests.ops.test_dequantise import stored
from tests.training.test_graphs import make_batch, require_captured_bits

CPU = torch.device("cpu")


def weights(count: int) -> list[tuple[Any, ...]]:
    """Different weights, each as `dequantise` takes it."""
    shapes = [(rows, 64) for rows in range(1, count + 1)]
    return [(*stored("nf4", x), "nf4", x[0] * 64, torch.float32) for x in shapes]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of weights that were ready at each recurrence."""
    found: list[int] = []
    begin = ahead._Follower.begin_recurrence

    def count(self: Any) -> None:
        begin(self)
        found.append(sum(x.numel() for x in self._ready.values()))

    monkeypatch.setattr(ahead._Follower, "begin_recurrence", count)
    return found


def take(wanted: list[tuple[Any, ...] | None]) -> None:
    """Makes weights dense and compares them; None is where a recurrence begins."""
    for x in wanted:
        if x is None:
            begin_recurrence()
        else:
            assert torch.equal(make_dense(*x), dequantise(*x))


def test_at_a_recurrence_the_weights_up_to_the_next_are_begun(begun: list[int]) -> None:
    a, b, c, _, d = weights(5)
    # forward and backward of two layers, between which a weight is wanted twice
    wanted = [a, None, b, c, None, d, d, None, c, b, None, a]
    with note_order() as order:
        take(wanted)
    assert begun == []
    with follow_order(order, CPU):
        take(wanted)
    assert begun == [64 * x for x in (2 + 3, 5, 3 + 2, 1)]
    # nothing is followed or noted any more
    take(wanted)
    assert len(begun) == 4 and sum(len(part) for part in order) == 8


def test_no_more_is_begun_than_a_layer_has(begun: list[int]) -> None:
    a, b, head = *weights(2), (*stored("nf4", (90, 64)), "nf4", 90 * 64, torch.float32)
    wanted = [b, None, a, b, None, a, b, None, a, head, head, a, None, b, a]
    with note_order() as order:
        take(wanted)
    with follow_order(order, CPU):
        take(wanted)
    assert begun == [64 * x for x in (3, 3, 1, 3)]


@pytest.mark.parametrize("seed", range(5))
def test_another_order_gives_what_is_asked_for(seed: int, begun: list[int]) -> None:
    wanted = [*weights(4), None, None]
    draw = random.Random(seed)
    with note_order() as order:
        take(draw.choices(wanted, k=20))
    with follow_order(order, CPU):
        take(draw.choices(wanted, k=30))
    assert begun


def test_what_fails_leaves_nothing_to_be_followed(begun: list[int]) -> None:
    with note_order() as order:
        take([*weights(3), None])
    with pytest.raises(ZeroDivisionError), follow_order(order, CPU):
        raise ZeroDivisionError
    take([*weights(3), None])
    assert begun == []


@pytest.mark.gpu
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("method", ["lora", "miss"])
@pytest.mark.parametrize("quant", ["int8", "nf4", "nf4_nested"])
def test_a_graph_that_makes_weights_dense_ahead_gives_the_bits_of_its_kernels(
    quant: str, method: Any, grad_cp: bool, make_model_file: Callable[..., Path], begun: list[int]
) -> None:
    path = make_model_file(n_embd=512, dim_att=512, dim_ffn=2048)
    device = torch.device("cuda")
    model = rwkv_peft.load_model(path, device="cuda", dtype="bfloat16").train()
    model.grad_cp = grad_cp
    for name, layer in list(stored_layers(model)):
        model.set_submodule(name, quantise(layer.weight, Storage(quant, torch.bfloat16)))
    trained = dict(attach(model, method, {"r": 8}))
    generator = torch.Generator(device).manual_seed(0)
    for parameter in trained.values():
        parameter.data.normal_(0, 0.02, generator=generator)
    batches = [make_batch(2, 256, packed=False, seed=seed) for seed in range(5)]
    require_captured_bits(model, trained, batches)
    assert bool(begun) == (not grad_cp)
