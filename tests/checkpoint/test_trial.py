"""The trial before a run finds what could not be saved, read or merged after it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint import trial
from rwkv_peft.checkpoint.trial import try_cycle
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.attach import attach
from tests.methods.test_catalog import CASES

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "saved modules": ("lora", {"modules_to_save": ["head", "ffn", "ln_x"]}),
    "tokens": ("lora", {"trainable_token_indices": {"emb": [1], "head": [2]}}),
    "embedding": ("pissa", {"r": 4, "target_modules": ["emb", "head", "key"]}),
    "parameters": ("lora", {"target_parameters": ["att.key.weight"]}),
    "kasa": ("lora", {"r": 4, "kasa_config": {}}),
    "one kind of ia3": ("ia3", {"target_modules": ["att.key"], "feedforward_modules": []}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_method_passes_and_nothing_is_left_behind(dtype: str, model_file: Path) -> None:
    for case, (method, options) in {**CASES, **MORE}.items():
        model = rwkv_peft.load_model(model_file, dtype=dtype)
        attachment = attach(model, method, options)
        before, generator = model.state_dict(), torch.get_rng_state()
        before = {name: x.clone() for name, x in before.items()}
        try_cycle(model, attachment)
        assert torch.equal(torch.get_rng_state(), generator), case
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items()), case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vblora", {"vector_length": 64, "save_only_topk_weights": True}, "infinity values"),
        ("pvera", {"sample_at_inference": True}, "other outputs after reading"),
        ("lora", {"trainable_token_indices": {"emb": [-1]}}, "cannot be merged"),
    ],
)
def test_what_could_not_be_read_or_merged_is_refused(
    method: str, options: dict[str, Any], message: str, model_file: Path
) -> None:
    model = rwkv_peft.load_model(model_file)
    attachment = attach(model, method, options)
    with pytest.raises(ConfigError, match=f"as a trial on single layers shows: .*{message}"):
        try_cycle(model, attachment)


def test_an_unknown_failure_of_any_step_is_one_line(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("no such\nattribute")

    model = rwkv_peft.load_model(model_file)
    attachment = attach(model, "lora", {})
    for step in ("to_saved", "to_config", "attach_adapter", "load_values", "MergedWeights"):
        with monkeypatch.context() as patch:
            patch.setattr(trial, step, fail)
            with pytest.raises(ConfigError, match="AttributeError: no such attribute"):
                try_cycle(model, attachment)


def test_a_copy_of_a_large_model_is_not_made(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rwkv_peft.load_model(model_file)
    attachment = attach(model, "lora", {"modules_to_save": ["head", "emb"]})
    sizes: list[int] = []
    lay_out = trial._lay_out

    def measured(places: Any) -> Any:
        made = lay_out(places)
        sizes.append(sum(p.numel() for p in made.parameters()))
        return made

    monkeypatch.setattr(trial, "_lay_out", measured)
    try_cycle(model, attachment)
    assert max(sizes) <= 128 * 128 + 2
