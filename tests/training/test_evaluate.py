import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import rwkv_peft
from rwkv_peft.data.documents import Documents
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState
from rwkv_peft.training.evaluate import evaluate_loss

LENGTHS = (5, 41, 2, 64, 17)


@pytest.fixture
def model(make_model_file: Callable[..., Path]) -> RWKV:
    return rwkv_peft.load_model(make_model_file(dtype=torch.float32), dtype="float64")


def make_documents(has_weights: bool = False) -> Documents:
    rng = np.random.default_rng(0)
    count = sum(LENGTHS)
    weights = rng.integers(0, 4, count).astype(np.float32) / 2 if has_weights else None
    return Documents(
        paths=("made up",),
        tokens=rng.integers(1, 320, count),
        starts=np.cumsum([0, *LENGTHS]),
        lines=np.arange(1, len(LENGTHS) + 1),
        sources=np.zeros(len(LENGTHS), dtype=np.uint8),
        weights=weights,
    )


def expected_loss(
    model: RWKV, documents: Documents, state: RWKVState | None = None
) -> tuple[float, float]:
    """Document by document, straight from the logits."""
    total = weight = 0.0
    for first, end in zip(documents.starts[:-1], documents.starts[1:], strict=True):
        tokens = torch.from_numpy(documents.tokens[first:end].copy())
        logits, _ = model(tokens[None, :-1], state)
        losses = -logits[0].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
        counts = torch.ones_like(losses)
        if documents.weights is not None:
            counts = torch.from_numpy(documents.weights[first + 1 : end].copy()).double()
        total += (losses * counts).sum().item()
        weight += counts.sum().item()
    return total, weight


@pytest.mark.parametrize("ctx_len", [1, 7, 16, 1024])
@pytest.mark.parametrize("has_weights", [False, True])
def test_evaluation_is_that_of_whole_documents_in_windows_of_any_size(
    has_weights: bool, ctx_len: int, model: RWKV
) -> None:
    documents = make_documents(has_weights)
    expected, weight = expected_loss(model, documents)
    found, counted = evaluate_loss(model, documents, ctx_len=ctx_len, micro_bsz=2)
    assert counted == pytest.approx(weight)
    assert found == pytest.approx(expected, rel=1e-12)


def test_evaluation_begins_in_the_state_that_is_given(model: RWKV) -> None:
    documents, states = make_documents(), LearnedStates(model)
    for parameter in states.values():
        torch.nn.init.normal_(parameter, std=30)
    narrow = states.rows([""])
    state = RWKVState(narrow.att_shift.double(), narrow.ffn_shift.double(), narrow.wkv.double())
    expected, _ = expected_loss(model, documents, state)
    untuned, _ = expected_loss(model, documents)
    found, _ = evaluate_loss(
        model, documents, initial_state=lambda batch: state.expand(len(batch.tokens))
    )
    assert found == pytest.approx(expected, rel=1e-12)
    assert not math.isclose(found, untuned, rel_tol=1e-5)
