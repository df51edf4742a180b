"""A run that stopped goes on from its checkpoint, and ends with the bits of one that never did."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.config import TrainConfig
from rwkv_peft.training.metrics import RunFolder, StepRecord
from rwkv_peft.training.run import Result, train
from tests.methods.test_catalog import CASES

# of a step's record, what is measured and never twice the same
MEASURED = ("t_cost", "kt_s", "peak_memory")


@pytest.fixture
def config(
    make_model_file: Callable[..., Path], make_data_file: Callable[..., Path], tmp_path: Path
) -> TrainConfig:
    sizes = {"n_layer": 1, "n_embd": 64, "dim_att": 64, "dim_ffn": 128}
    texts = [f"row {i}: " + "words and " * (1 + i % 3) for i in range(8)]
    return TrainConfig(
        load_model=str(make_model_file(**sizes)),
        data_file=str(make_data_file(texts)),
        proj_dir=str(tmp_path / "whole"),
        peft="lora",
        peft_config={"r": 4},
        dataload="pack",
        ctx_len=40,
        micro_bsz=2,
        epoch_count=2,
        lr_init=1e-2,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
        merge=0,
    )


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Sends SIGTERM when this step is done."""
    record = RunFolder.record

    def note(self: RunFolder, found: StepRecord) -> None:
        record(self, found)
        if found.step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "record", note)
        yield


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "loss_data.jsonl").read_text().splitlines()
    return [{k: x for k, x in json.loads(line).items() if k not in MEASURED} for line in lines]


def log(folder: Path) -> str:
    """The log without the folder's name, its two lines with the time, and a check's duration."""
    _, *lines = (folder / "train_log.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("time: about")]
    lines = [re.sub(r"(^check: .*) \([\d.]+ s\)$", r"\1", line) for line in lines]
    return "\n".join(lines).replace(str(folder), "FOLDER")


def results(folder: Path) -> dict[str, Any]:
    """The bytes of what was learned, by the file's name."""
    files = [*folder.glob("rwkv-*.pth"), *folder.glob("rwkv-*/adapter_model.safetensors")]
    return {str(x.relative_to(folder)): x.read_bytes() for x in files}


def assert_same(resumed: Path, whole: Path) -> None:
    assert losses(resumed) == losses(whole)
    assert log(resumed) == log(whole)
    assert results(resumed) == results(whole) and results(whole)
    assert not [x for x in resumed.rglob(".*") if x.name != ".run.lock"]


def run_in_parts(config: TrainConfig, tmp_path: Path, *steps: int) -> Result:
    """A run in another folder that is stopped after each of these steps and goes on."""
    config = replace(config, proj_dir=str(tmp_path / "parts"))
    for step in steps:
        with stopped_after(step):
            result = train(config)
        assert (result.signal, result.steps) == (signal.SIGTERM, step)
        # all that the process knew is gone, but what another run would begin with
        torch.manual_seed(99)
        config = replace(config, resume="auto")
    return train(config)


# what is trained, and how the data comes
RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all weights": {"peft": "none", "peft_config": {}, "weight_decay": 0.1},
    "dropout": {"peft_config": {"r": 4, "lora_dropout": 0.3}, "merge": 1},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "pissa": {"peft": "pissa", "peft_config": {"r": 4}},
    "state": {"peft": "state", "peft_config": {}, "dataload": "pad"},
    "adalora": {
        "peft": "adalora",
        "peft_config": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    },
    "pvera": {"peft": "pvera", "peft_config": {"generator_seed": 5}, "precision": "bf16"},
    "workers": {"num_workers": 2, "dataload": "pad"},
    "accumulated": {"accumulate_grad_batches": 2, "micro_bsz": 1},
    "chunks": {"train_type": "infctx", "dataload": "pad", "chunk_ctx": 16},
    "pissa in 4 bits": {"peft": "pissa", "peft_config": {"r": 4}, "quant": "nf4", "merge": 1},
    "chunks in 8 bits": {
        "train_type": "infctx",
        "dataload": "pad",
        "chunk_ctx": 16,
        "quant": "int8",
        "quant_head": 1,
    },
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "parts": {"train_parts": ["ln", "emb"]},
    "olora": {"peft_config": {"r": 4, "init_lora_weights": "olora"}, "precision": "bf16"},
    "kasa": {"peft_config": {"r": 4, "kasa_config": {}}},
    "velora": {"peft_config": {"r": 4, "velora_config": {}}},
    "full state": {
        "peft": "state",
        "peft_config": {},
        "dataload": "pad",
        "train_type": "fullstate",
    },
    "one by one": {"dataload": "only", "micro_bsz": 1, "epoch_steps": 5},
    "windows": {"dataload": "get"},
    "part of an epoch": {"epoch_steps": 3, "epoch_count": 3},
    "in order": {"data_shuffle": 0},
}
ALL_RUNS = [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_RUNS)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL_RUNS)
def test_a_run_stopped_twice_ends_as_one_that_never_was(
    name: str, config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, **(RUNS | MORE_RUNS)[name])
    whole = train(config)
    assert whole.steps > 3
    parts = run_in_parts(config, tmp_path, 1, 3)
    assert parts.steps == whole.steps and parts.loss == whole.loss
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_several_states_go_on(
    quant: Any, config: TrainConfig, make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "states.jsonl"
    rows = [{"text": "words " * (1 + i % 3), "state": "ab"[i % 2]} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(
        config, data_file=str(data), peft="state", peft_config={}, dataload="pad", quant=quant
    )
    train(config)
    run_in_parts(config, tmp_path, 2, 4)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert len(results(tmp_path / "whole")) == 4


def test_checkpoints_are_made_when_they_are_due_and_the_newest_are_kept(
    config: TrainConfig, tmp_path: Path
) -> None:
    plain = train(config)
    config = replace(config, save_every_steps=3, proj_dir=str(tmp_path / "saving"))
    result = train(replace(config, keep=0))
    names = [x.name for x in sorted((tmp_path / "saving" / "checkpoints").iterdir())]
    steps = [*range(3, plain.steps + 1, 3)]
    if plain.steps not in steps:
        steps.append(plain.steps)
    assert names == [f"step-{step:06d}" for step in steps] and len(steps) > 2
    assert result.checkpoint == tmp_path / "saving" / "checkpoints" / names[-1]
    # making them changes nothing
    assert_same(tmp_path / "saving", tmp_path / "whole")
    # from an earlier one, by its path: the later ones are of a course that was given up
    config = replace(config, resume=str(result.checkpoint.with_name(names[0])), keep=1)
    torch.manual_seed(99)
    assert train(config).steps == plain.steps
    assert [x.name for x in (tmp_path / "saving" / "checkpoints").iterdir()] == names[-1:]
    assert_same(tmp_path / "saving", tmp_path / "whole")


def test_a_run_stopped_at_the_end_of_an_epoch_has_its_files_once(
    config: TrainConfig, tmp_path: Path
) -> None:
    whole = train(config)
    half = whole.steps // 2
    config = replace(config, proj_dir=str(tmp_path / "parts"))
    with stopped_after(half):
        result = train(config)
    assert result.steps == half and result.signal
    assert result.adapter == tmp_path / "parts" / "rwkv-0-adapter"
    train(replace(config, resume="auto"))
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_every_method_goes_on_where_its_factors_are_found_otherwise(
    case: str, config: TrainConfig, decompose_otherwise: Callable[[], None], tmp_path: Path
) -> None:
    name, options = CASES[case]
    if name == "trainable_tokens":
        options = {"token_indices": [ord(x) + 1 for x in "andrsw "]}
    options = {key: value for key, value in options.items() if key != "total_step"}
    config = replace(config, peft=name, peft_config=options, precision="bf16")
    train(config)
    config = replace(config, proj_dir=str(tmp_path / "parts"))
    with stopped_after(2):
        assert train(config).signal
    # other clusters of AdaMSS are other parameters, and refused
    if case != "adamss":
        decompose_otherwise()
    train(replace(config, resume="auto"))
    assert_same(tmp_path / "parts", tmp_path / "whole")
