"""Answers of two models side by side, and the texts on which they are compared."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.compare import TEXTS, Sample, compare_models, draw_sample
from rwkv_peft.data.tokenizer import Tokenizer


@torch.no_grad()
def differences(wanted: list[Tensor], found: list[Tensor]) -> dict[str, float]:
    """The comparison, by PyTorch's own divergence."""
    one, other = torch.cat(wanted).double(), torch.cat(found).double()
    gap = (one - other).abs()
    kl = F.kl_div(
        other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    same = (one.argmax(-1) == other.argmax(-1)).double().mean()
    return {
        "max_difference": gap.max().item(),
        "mean_difference": gap.mean().item(),
        "kl": kl.item(),
        "top1_agreement": same.item(),
    }


def test_held_out_rows_are_drawn_from_the_whole_file(make_data_file: Callable[..., Path]) -> None:
    rows = make_data_file([f"{i} " + "words " * 100 for i in range(40)])
    drawn = draw_sample(65536, 300, str(rows)).rows
    assert [len(row) for row in drawn] == [64, 64, 64, 64, 44]
    assert len({tuple(row) for row in drawn}) == 5
    short = draw_sample(65536, 300, str(make_data_file(["one", "two"], "short.jsonl"))).rows
    assert sum(map(len, short)) == 4


def test_the_built_in_text_is_whole_within_its_tokens() -> None:
    rows = draw_sample(65536, 64).rows
    assert [len(row) for row in rows] == [32, 32]
    assert draw_sample(320, 0).rows == []
    tokenizer = Tokenizer()
    everything = draw_sample(65536, 1000).rows
    assert everything == [tokenizer.encode(text) for text in TEXTS]
    small = Tokenizer(257)
    assert [small.decode(row) for row in draw_sample(257, 1000).rows] == list(TEXTS)


def test_answers_that_differ_are_measured(make_model_file: Callable[..., Path]) -> None:
    one = rwkv_peft.load_model(make_model_file("one.pth", seed=1))
    other = rwkv_peft.load_model(make_model_file("other.pth", seed=2))
    rows = [[1, 2, 3, 4, 5], [7], [9, 8]]
    found = compare_models(one, other, Sample("rows", rows))
    wanted = [[m(torch.tensor([row]))[0][0].detach() for row in rows] for m in (one, other)]
    assert found.tokens == 8 and found.is_far
    for key, value in differences(*wanted).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-4), key
