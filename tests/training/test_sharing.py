"""Which strategy several devices share a run by."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel import strategy
from rwkv_peft.training.memory import guess_memory, spared_bytes
from rwkv_peft.training.sharing import require_shareable, suit_strategy
from tests.conftest import make_model_config

VALUES: dict[str, Any] = {
    "strategy": "fsdp",
    "peft": "lora",
    "peft_config": {},
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
    # stored ones without their scales, or the second copy of fp8: half a byte, or one, each
    stored = 24 * 12 * 2048**2
    for quant, each in (("nf4", 0.5), ("int8", 1.0), ("fp8", 1.0)):
        wanted = ((blocks - stored) * 2 + stored * each) * (7 / 8 - 2 / 24)
        assert spared(8, trains_weights=False, quant=quant) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"peft": "none", "optimizer": "muon"},
            "--optimizer muon .* use adamw or sgd or lion",
        ),
        ({"peft": "none", "optimizer": "adamw8bit"}, "--optimizer adamw8bit"),
        ({"cuda_graph": 1}, "--cuda_graph 1"),
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


# what a stage of DeepSpeed cannot do, by the first that cannot
REFUSED: list[tuple[int, dict[str, Any], int, str]] = [
    (1, {"optimizer": "lion"}, 0, "--optimizer lion"),
    (1, {"precision": "fp16"}, 0, "--precision fp16"),
    (1, {"peft": "adalora"}, 0, "--peft adalora"),
    (1, {"peft": "state"}, 2, "several states"),
    (1, {"cuda_graph": 1}, 0, "--cuda_graph 1"),
    (3, {"quant": "nf4"}, 0, "--quant nf4"),
    (3, {"peft_config": {"kasa_config": {}}}, 0, "kasa_config"),
    (3, {"compile": 1}, 0, "--compile 1"),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["", "_offload"])
@pytest.mark.parametrize(("first", "changes", "num_states", "named"), REFUSED)
def test_what_a_stage_of_deepspeed_cannot_do_is_refused_by_name(
    stage: int,
    offload: str,
    first: int,
    changes: dict[str, Any],
    num_states: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strategy, "version", lambda _: "0.19.8")
    name = f"deepspeed_stage_{stage}{offload}"
    values = {**VALUES, "strategy": name, **changes}
    if stage < first:
        require_shareable(values, 2, num_states)
        return
    with pytest.raises(ConfigError, match=f"{name} does not go with .*{named}.* so far: use"):
        require_shareable(values, 2, num_states)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        # of bf16 weights that are all trained: the weight, gradient, value and moments
        ("deepspeed_stage_1", 2 + 4 + 12 / 4),
        ("deepspeed_stage_2", 2 + (4 + 12) / 4),
        ("deepspeed_stage_2_offload", 2 + 4 / 4),
    ],
)
def test_a_stage_spares_a_device_what_others_or_the_host_have(name: str, held: float) -> None:
    model_config, number = make_model_config(n_layer=2, n_embd=64, dim_att=64, dim_ffn=64), 10**9

    def guess(strategy: str) -> float:
        settings: Any = SimpleNamespace(
            strategy=strategy,
            num_ranks=4,
            dtype=torch.bfloat16,
            peft="none",
            optimizer="adamw",
            optimizer_cpu=0,
            quant="none",
            quant_head=0,
            emb_cpu=0,
            grad_cp=0,
            micro_bsz=1,
            ctx_len=16,
            chunk_ctx=0,
            is_infctx=False,
            accumulate_grad_batches=1,
        )
        return guess_memory(settings, model_config, "torch", number, number)

    # 16 bytes with ddp, whose values are the weights and the bits that they lack
    assert guess("ddp") - guess(name) == pytest.approx(number * (16 - held))


@pytest.mark.parametrize("there", ["", "0.18.2", "0.19.7"])
def test_deepspeed_that_is_not_there_or_too_old_is_asked_for_by_its_extra(
    there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(_: str) -> str:
        if not there:
            raise PackageNotFoundError
        return there

    monkeypatch.setattr(strategy, "version", find)
    words = rf"needs DeepSpeed 0\.19\.8 or later, and {there or 'none'} is .*rwkv-peft\[deepspeed\]"
    with pytest.raises(ConfigError, match=words):
        strategy.require_strategy("deepspeed_stage_2", 2)
    # on one device there is nothing to do for it
    strategy.require_strategy("deepspeed_stage_2", 1)
    monkeypatch.setattr(strategy, "version", lambda _: "0.20.0rc1")
    strategy.require_strategy("deepspeed_stage_2", 2)
