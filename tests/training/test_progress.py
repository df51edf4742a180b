"""A run that is taken up goes on as if it had never stopped."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.choose import choose
from rwkv_peft.training.loop import run_steps
from rwkv_peft.training.metrics import LogPlaces, RunFolder, StepRecord
from rwkv_peft.training.prepare import find_facts, prepare_run
from rwkv_peft.training.run_state import Run

RUNS: dict[str, dict[str, Any]] = {
    "full": {"peft": "none"},
    "lora with dropout": {"peft": "lora", "peft_config": {"r": 4, "lora_dropout": 0.2}},
    "bf16": {"peft": "lora", "peft_config": {"r": 4}, "precision": "bf16"},
    "fp16": {"peft": "lora", "peft_config": {"r": 4}, "precision": "fp16"},
    "pissa": {"peft": "pissa", "peft_config": {"r": 4, "svd_niter": 2}},
    "state": {"peft": "state", "dataload": "pad"},
    "adalora": {
        "peft": "adalora",
        "peft_config": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1},
    },
    "accumulated": {"peft": "none", "accumulate_grad_batches": 3},
}


@pytest.fixture
def config(model_file: Path, data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        dataload="pack",
        ctx_len=48,
        micro_bsz=2,
        epoch_count=3,
        random_seed=1,
        weight_decay=0.1,
        precision="fp32",
        accelerator="cpu",
    )


def stop_after(steps: int) -> Callable[[Run, StepRecord], None]:
    def stop(run: Run, record: StepRecord) -> None:
        run.stopped_by = 15 if record.step == steps else 0

    return stop


@pytest.mark.parametrize("name", RUNS)
def test_a_run_taken_up_from_its_state_ends_with_the_same_bits(
    name: str, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, **RUNS[name])
    losses: dict[str, list[float]] = {"whole": [], "parts": []}

    def note(kind: str) -> Callable[[Run, StepRecord], None]:
        return lambda run, record: losses[kind].append(record.loss)

    whole, _ = prepare_run(config)
    run_steps(whole, [note("whole")])
    assert whole.plan.steps > 4

    first, _ = prepare_run(config)
    run_steps(first, [note("parts"), stop_after(3)])
    saved = copy.deepcopy(first.state_dict())
    second, _ = prepare_run(config)
    second.load_state_dict(saved)
    run_steps(second, [note("parts")])

    assert losses["parts"] == losses["whole"]
    assert second.progress == whole.progress
    for name, value in whole.optimizer.values.items():
        assert torch.equal(value, second.optimizer.values[name]), name


def test_a_run_that_goes_on_cuts_its_logs_and_appends(tmp_path: Path) -> None:
    def record(folder: RunFolder, *steps: int) -> None:
        for step in steps:
            folder.record(StepRecord(step, 0, 1.0, 0.1, 1.0, 5, 5, 0.1, 0.05, 0))
            folder.log(f"line {step}")

    with RunFolder(tmp_path) as folder:
        record(folder, 1, 2)
        lengths = folder.lengths()
        record(folder, 3, 4)
    for shorter in (0, 3):
        # lines that a power cut took are cut off whole
        lengths = {name: length - shorter for name, length in lengths.items()}
        with RunFolder(tmp_path, places=LogPlaces(tmp_path, lengths)) as folder:
            folder.log("said again")
            folder.introduce()
            record(folder, 5)
        lines = (tmp_path / "loss_data.jsonl").read_text().splitlines()
        kept = [1, 2] if not shorter else [1]
        assert [json.loads(line)["step"] for line in lines] == [*kept, 5]
        lines = (tmp_path / "train_log.txt").read_text().splitlines()
        assert lines[1:] == [f"line {x}" for x in (*kept, 5)]
    assert len(list(tmp_path.glob("loss_data*"))) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peft": "state", "dataload": "auto"},
        {"peft": "pissa"},
        {"train_type": "infctx"},
        {"train_type": "fullstate", "bptt_chunks": "all"},
    ],
)
def test_settings_as_a_config_are_chosen_as_they_are(
    changes: dict[str, Any], config: TrainConfig
) -> None:
    left_open = {"dataload": "auto", "precision": "auto", "random_seed": -1, "proj_dir": ""}
    left_open |= dict.fromkeys(("ctx_len", "micro_bsz", "epoch_count"))
    config = dataclasses.replace(config, **{**left_open, **changes})
    facts = find_facts(config, read_weights(config.load_model))
    plan = choose(config, facts)
    assert None not in dataclasses.astuple(plan.settings)
    said = TrainConfig(
        **{f.name: getattr(plan.settings, f.name) for f in dataclasses.fields(plan.settings)}
    )
    again = choose(said, facts)
    assert again.settings == plan.settings
    assert again.choices == []
