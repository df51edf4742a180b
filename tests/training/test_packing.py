"""Packed rows train as their documents would one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rwkv_peft
from rwkv_peft.data.batching import Batch, Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.models import version_named
from rwkv_peft.models.base import RWKV
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.training.step import full_step

VERSIONS: dict[str, dict[str, Any]] = {
    "x070": {},
    "x060": {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448},
    "x052": {"version": "x052", "ranks": {}, "dim_ffn": 448},
}
REQUEST = Request(torch.device("cpu"), torch.float64, 64)
CASES = [
    (version, backend.name)
    for version in VERSIONS
    for backend in version_named(version).backends
    if backend.objection(REQUEST) is None
]
# float64 rounds at 1e-16; each gradient is a sum of 1e4 to 1e5 terms that largely cancel
ACCURACY = 1e-11


def make_documents() -> Documents:
    """Twelve documents, two of them longer than a row of 64, with masks and uneven weights."""
    rng = np.random.default_rng(0)
    sizes = [5, 1, 30, 17, 70, 9, 22, 64, 40, 3, 150, 11]
    starts = np.cumsum([0, *(size + 1 for size in sizes)])
    return Documents(
        paths=("a.jsonl",),
        tokens=rng.integers(1, 320, starts[-1], dtype=np.int32),
        starts=starts,
        lines=np.arange(1, 13),
        sources=np.zeros(12, dtype=np.uint8),
        weights=rng.choice([0, 0.5, 1, 1, 2], starts[-1]).astype(np.float32),
    )


def batches_of(documents: Documents, dataload: Any, micro_bsz: int) -> list[Batch]:
    batches = Batches(
        documents, dataload=dataload, ctx_len=64, micro_bsz=micro_bsz, seed=0, is_shuffled=True
    )
    return [batches[i] for i in range(len(batches))]


def loss_and_gradients(
    model: RWKV, batches: list[Batch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one optimizer step over all batches, as the training loop divides it."""
    model.zero_grad()
    weight = sum(batch.weight for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        output = full_step(
            model, batch, divisor=weight, l2wrap=1e-2, backward=torch.Tensor.backward
        )
        total += output.loss_sum / weight
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return total, found


@pytest.fixture
def make_model(make_model_file: Callable[..., Path]) -> Callable[..., RWKV]:
    def make(version: str, op: str) -> RWKV:
        path = make_model_file(dtype=torch.float32, **VERSIONS[version])
        return rwkv_peft.load_model(path, dtype="float64", op=op).requires_grad_(True)

    return make


@pytest.mark.parametrize(("version", "op"), CASES)
def test_packed_rows_have_the_loss_and_gradients_of_their_documents_one_by_one(
    version: str, op: str, make_model: Callable[..., RWKV]
) -> None:
    model, documents = make_model(version, op), make_documents()
    packed, alone = batches_of(documents, "pack", 2), batches_of(documents, "only", 1)
    assert len(packed) < len(alone) / 3
    assert max(len(set(ids.tolist())) for b in packed for ids in b.segment_ids) > 2
    loss, gradients = loss_and_gradients(model, packed)
    expected_loss, expected = loss_and_gradients(model, alone)
    assert abs(loss - expected_loss) < ACCURACY * expected_loss
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).abs().max()
        assert error <= ACCURACY * expected[name].abs().max(), name


@pytest.mark.parametrize(("version", "op"), CASES)
def test_a_document_never_sees_its_neighbours_in_a_row(
    version: str, op: str, make_model: Callable[..., RWKV]
) -> None:
    model = make_model(version, op).requires_grad_(False)
    batch = max(batches_of(make_documents(), "pack", 1), key=lambda b: b.segment_ids.max())
    ids = batch.segment_ids
    assert ids is not None and ids.max() >= 2
    before, _ = model.hidden(batch.tokens, segment_ids=ids)
    for changed in range(int(ids.max()) + 1):
        inside = ids == changed
        tokens = torch.where(inside, (batch.tokens + 7) % 320, batch.tokens)
        after, _ = model.hidden(tokens, segment_ids=ids)
        difference = (after - before).abs().amax(-1)
        assert (difference[inside] > 1e-3).any()
        assert (difference[~inside] < 1e-13).all()
        # without the numbers the neighbours behind it would see the change
        if changed < ids.max():
            leaked = (model.hidden(tokens)[0] - model.hidden(batch.tokens)[0]).abs().amax(-1)
            assert (leaked[ids > changed] > 1e-6).any()
