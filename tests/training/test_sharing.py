"""Which strategy several devices share a run by."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_peft.errors import ConfigError
from rwkv_peft.training.memory import spared_bytes
from rwkv_peft.training.sharing import require_shareable, suit_strategy
from tests.conftest import make_model_config

VALUES: dict[str, Any] = {
    "strategy": "fsdp",
    "peft": "lora",
    "precision": "bf16",
    "quant": "none",
    "train_parts": [],
    "optimizer": "adamw",
    "compile": "auto",
    "cuda_graph": "auto",
}


@pytest.mark.parametrize(
    ("peft", "gib", "wanted", "said"),
    [
        ("lora", 80, "ddp", "the model takes 24.8 GiB"),
        ("lora", 40, "fsdp", "the model takes 24.8 GiB"),
        ("lora", None, "ddp", "the model takes 24.8 GiB"),
        ("none", 400, "ddp", "what trains it take 198.2 GiB"),
        ("none", 140, "fsdp", "what trains it take 198.2 GiB"),
    ],
)
def test_what_leaves_no_room_on_a_device_is_shared(
    peft: str, gib: int | None, wanted: str, said: str
) -> None:
    memory = None if gib is None else gib << 30
    # the weights of 13.3b take 26.6 GB in bf16, and 16 bytes each where they are trained
    facts: Any = SimpleNamespace(model_config=None, num_weights=13_300_000_000, memory=memory)
    name, reason = suit_strategy({**VALUES, "peft": peft}, facts)
    assert name == wanted and said in reason


def test_other_devices_spare_one_its_blocks_and_where_weights_are_trained_the_rest_too() -> None:
    # 24 layers of width 2048: 1.26 G weights in blocks, 0.27 G in embedding and head
    model_config = make_model_config(
        n_layer=24, n_embd=2048, dim_att=2048, dim_ffn=8192, vocab_size=65536
    )
    numbers, blocks, tables = 1_527_000_000, 1_258_564_544, 268_435_456

    def spared(num_ranks: int, **options: Any) -> float:
        found = spared_bytes(model_config, torch.bfloat16, numbers, numbers, num_ranks, **options)
        return found

    # of an adapter's base embedding and head are whole, and two blocks are at a time
    wanted = 2 * blocks * (7 / 8 - 2 / 24)
    assert spared(8, trains_weights=False) == pytest.approx(wanted)
    # 16 bytes each; two blocks and both tables are gathered, and their gradients and those of one
    # block stand in bf16 and float32 while they are summed
    block = blocks / 24
    gathered = 2 * (2 * block + tables) + 6 * (block + tables)
    wanted = 16 * numbers * 7 / 8 - gathered
    assert spared(8, trains_weights=True) == pytest.approx(wanted)
    assert 0 < spared(8, trains_weights=False, quant="nf4") < spared(8, trains_weights=False) / 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"peft": "none", "optimizer": "muon"},
            "--optimizer muon .* use adamw or sgd or lion",
        ),
        ({"peft": "none", "optimizer": "adamw8bit"}, "--optimizer adamw8bit"),
        ({"cuda_graph": 1}, "--cuda_graph 1"),
        ({"strategy": "deepspeed_stage_2"}, "deepspeed_stage_2 is not built yet"),
    ],
)
def test_what_a_strategy_cannot_share_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        require_shareable({**VALUES, **changes}, 2)
    for served in (
        {},
        {"peft": "none"},
        {"train_parts": ["emb"]},
        {"compile": 1},
        {"optimizer": "muon"},
    ):
        require_shareable({**VALUES, **served}, 2)
