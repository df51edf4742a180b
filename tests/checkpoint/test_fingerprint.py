"""What makes a base another base."""

from pathlib import Path

import torch

from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.pth import read_weights, write_weights


def test_a_base_is_the_same_in_any_dtype_order_and_format(model_file: Path, tmp_path: Path) -> None:
    weights = read_weights(model_file)
    given = fingerprint(weights)
    assert len(given) == 32
    assert fingerprint({n: weights[n].float() for n in reversed(weights)}) == given
    write_weights(tmp_path / "same.safetensors", weights)
    assert fingerprint(read_weights(tmp_path / "same.safetensors")) == given
    assert fingerprint(weights | {"blocks.0.att.time_state": torch.ones(2, 64, 64)}) == given


def test_a_base_that_was_tuned_is_another(model_file: Path) -> None:
    weights = read_weights(model_file)
    given = fingerprint(weights)
    for name in ("blocks.0.att.key.weight", "blocks.1.ffn.value.weight"):
        assert fingerprint(weights | {name: weights[name] * 1.01}) != given
    assert fingerprint(weights | {"emb.weight": weights["emb.weight"][:-1]}) != given
