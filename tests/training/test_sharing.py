"""Which strategy several devices share a run by."""

from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.errors import ConfigError
from rwkv_peft.training.sharing import require_shareable, suit_strategy

VALUES: dict[str, Any] = {
    "strategy": "fsdp",
    "peft": "lora",
    "precision": "bf16",
    "quant": "none",
    "train_parts": [],
    "optimizer": "adamw",
    "val_prompts": "",
    "compile": "auto",
    "cuda_graph": "auto",
}


@pytest.mark.parametrize(
    ("peft", "gib", "wanted"),
    [("lora", 80, "ddp"), ("lora", 40, "fsdp"), ("none", 40, "ddp"), ("lora", None, "ddp")],
)
def test_a_base_that_leaves_no_room_on_a_device_is_shared(
    peft: str, gib: int | None, wanted: str
) -> None:
    memory = None if gib is None else gib << 30
    # the weights of 13.3b take 26.6 GB in bf16
    facts: Any = SimpleNamespace(model_config=None, num_weights=13_300_000_000, memory=memory)
    name, reason = suit_strategy({**VALUES, "peft": peft}, facts, is_infctx=False)
    assert name == wanted and "24.8 GiB" in reason


@pytest.mark.parametrize(
    ("changes", "is_infctx", "named"),
    [
        ({}, True, "infctx"),
        ({"val_prompts": "prompts.txt"}, False, "--val_prompts"),
        (
            {"peft": "none", "optimizer": "muon"},
            False,
            "--optimizer muon .* use adamw or sgd or lion",
        ),
        ({"peft": "none", "optimizer": "adamw8bit"}, False, "--optimizer adamw8bit"),
        ({"compile": 1}, False, "--compile 1"),
        ({"strategy": "deepspeed_stage_2"}, False, "deepspeed_stage_2 is not built yet"),
    ],
)
def test_what_a_strategy_cannot_share_is_refused_by_name(
    changes: dict[str, Any], is_infctx: bool, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        require_shareable({**VALUES, **changes}, 2, is_infctx=is_infctx)
    for served in ({}, {"peft": "none"}, {"train_parts": ["emb"]}, {"optimizer": "muon"}):
        require_shareable({**VALUES, **served}, 2, is_infctx=False)
