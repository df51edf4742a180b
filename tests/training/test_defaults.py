"""What is chosen where nothing is said, by the evidence on docs/training.md."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.choose import choose
from rwkv_peft.training.defaults import choose_rate, choose_warmup, longest_chosen
from rwkv_peft.training.prepare import find_facts
from tests.conftest import make_model_config


def rate(method: str, width: int, **more: Any) -> float:
    values = {"peft": method, "peft_config": {}, "optimizer": "adamw", **more}
    return choose_rate(values, make_model_config(n_embd=width, dim_att=width))[0]


def test_the_rate_of_adapters_falls_with_the_root_of_the_width() -> None:
    # widths of 0.1B, 0.4B, 1.5B, 2.9B, 7.2B
    found = [rate("lora", width) for width in (768, 1024, 2048, 2560, 4096)]
    assert found == [3.3e-4, 2.8e-4, 2e-4, 1.8e-4, 1.4e-4]
    assert [rate("miss", w) for w in (768, 4096)] == [3.3e-4, 1.4e-4]
    pissa = {"init_lora_weights": "pissa_niter_4"}
    assert rate("lora", 2048, peft_config=pissa) == pytest.approx(2e-4 / 3, rel=0.02)
    assert rate("state", 768) == rate("state", 4096) == 1e-3
    assert rate("none", 768) == 3e-5 and rate("none", 3072) == 1.5e-5
    assert rate("vera", 768) == 2e-4
    assert rate("lora", 2048, optimizer="lion") == pytest.approx(4e-5)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (9, 0), (50, 5), (100, 10), (300, 10), (2000, 60), (10_000, 300)]
)
def test_the_rate_rises_over_three_in_a_hundred_steps(steps: int, warmup: int) -> None:
    assert choose_warmup(steps)[0] == warmup


def test_rows_are_as_long_as_memory_allows_up_to_what_official_files_know() -> None:
    values = {"precision": "bf16", "op": "triton", "micro_bsz": None, "peft": "lora"}
    values |= {"quant": "none", "quant_head": 0, "grad_cp": None, "optimizer": "adamw"}
    values["optimizer_cpu"] = 0
    facts: Any = SimpleNamespace(
        model_config=make_model_config(
            n_layer=24, n_embd=2048, dim_att=2048, dim_ffn=8192, vocab_size=65536
        ),
        num_weights=1_500_000_000,
        device=SimpleNamespace(type="cuda"),
    )

    def longest(gibibytes: int, **changes: Any) -> int:
        facts.memory = gibibytes << 30
        return longest_chosen({**values, **changes}, facts)

    found = [longest(gibibytes) for gibibytes in (4, 12, 24, 80)]
    assert found == sorted(found) and found[0] == 4096 and found[-1] == 16384
    assert longest(24, grad_cp=0) <= longest(24, grad_cp=1)
    # where dense weights leave room for the shortest alone
    least = max(n for n in range(4, 12) if longest(n) == 4096)
    assert longest(least, quant="nf4") > 4096


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ({}, {"r": 32, "lora_alpha": 32}),
        ({"peft": "lora"}, {"r": 32, "lora_alpha": 32}),
        ({"peft": "miss"}, {"r": 64}),
        ({"peft": "pissa"}, {"r": 32, "lora_alpha": 32, "init_lora_weights": "pissa_niter_4"}),
        # what is given is not added to
        ({"peft": "lora", "peft_config": {"r": 4}}, {"r": 4}),
        ({"peft": "state"}, {}),
        ({"peft": "vera"}, {}),
    ],
)
def test_a_method_without_options_has_the_rank_that_suits_most(
    said: dict[str, Any], options: dict[str, Any], model_file: Path, data_file: Path
) -> None:
    files = {"load_model": str(model_file), "data_file": str(data_file), "accelerator": "cpu"}
    config = TrainConfig(**files, **said)
    plan = choose(config, find_facts(config, read_weights(model_file)))
    assert plan.settings.peft_config == options
    assert plan.settings.lr_final == pytest.approx(
        plan.settings.lr_init / (100 if said.get("peft") == "state" else 10), rel=1e-5
    )
    # a run that goes on, with the same words, is the same
    again = choose(
        replace(config, peft_config=plan.settings.peft_config),
        find_facts(config, read_weights(model_file)),
    )
    assert again.settings.peft_config == options


def test_inspect_says_that_others_want_plain_states(
    cli: Callable[..., SimpleNamespace], model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    for train_type in ("state", "fullstate"):
        line = ["--train_type", train_type, "--epoch_steps", 1, "--epoch_count", 1]
        out = tmp_path / train_type
        assert cli("train", model_file, data_file, "--proj_dir", out, *line).code == 0
        text = cli("inspect", out / "rwkv-0.pth").out
        assert ("other programs read plain ones" in text) == (train_type == "fullstate")


def test_the_rates_that_were_measured_stand_in_the_results() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    text = (results / "state_rate_2cores_2026-11-29.md").read_text(encoding="utf-8")
    untuned = float(text.split("Untuned: ")[1].split()[0])
    rows = [x.strip("| ").split(" | ") for x in text.splitlines() if x.startswith("| 0")]
    measured = {float(x[0]): [float(y) for y in x[1:]] for x in rows}
    chosen = rate("state", 768)
    assert chosen in measured and all(loss < untuned for loss in measured[chosen])
    assert math.isfinite(untuned)
