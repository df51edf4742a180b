"""Loggers get what the run's files hold, and no error of theirs ends a run."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.run import train


class Service(ModuleType):
    """A logger that keeps what it is given."""

    def __init__(self, name: str, fails_in: str = "") -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.fails_in, self.started, self.lines, self.ended = fails_in, [], [], 0

    def _meet(self, where: str) -> None:
        if self.fails_in == where:
            raise KeyError("the service is gone")

    def init(self, **options: Any) -> None:
        self._meet("init")
        self.started.append(options)

    def log(self, values: dict[str, float], step: int) -> None:
        self._meet("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self._meet("finish")
        self.ended += 1


@pytest.fixture
def config(model_file: Path, data_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        values = {
            "load_model": str(model_file),
            "data_file": str(data_file),
            "val_file": str(data_file),
            "proj_dir": str(tmp_path / "out"),
            "peft_config": {"r": 4},
            "peft": "lora",
            "merge": 0,
            "epoch_count": 1,
            "ctx_len": 48,
            "micro_bsz": 8,
            "precision": "fp32",
            "accelerator": "cpu",
        }
        return TrainConfig(**{**values, **changes})

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_a_service_gets_every_step_and_evaluation(
    name: str, config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    result = train(config(report_to=[name], wandb="mine" if name == "wandb" else ""))
    (options,) = service.started
    assert options["project"] == ("mine" if name == "wandb" else "rwkv-peft")
    assert options["config"]["peft"] == "lora" and service.ended == 1
    steps = [step for step, values in service.lines if "train/loss" in values]
    assert steps == list(range(1, result.steps + 1))
    found = {step: values["val/loss"] for step, values in service.lines if "val/loss" in values}
    assert found == {x.step: x.loss for x in result.evaluations} and len(found) == 2
    values = next(values for _, values in service.lines if "train/loss" in values)
    assert values["speed/tokens_per_second"] > values["speed/trained_tokens_per_second"] * 0.9
    assert {"train/lr", "train/grad_norm", "memory/peak_bytes"} <= set(values)


def resumed(config: Callable[..., TrainConfig], name: str) -> TrainConfig:
    """A finished run of eight steps with evaluations, to go on from its second."""
    whole = config(report_to=[name], micro_bsz=4, epoch_count=2, save_every_steps=2, keep=0)
    assert train(replace(whole, val_every_steps=1)).steps == 8
    checkpoint = str(Path(whole.proj_dir, "checkpoints", "step-000002"))
    return replace(whole, val_every_steps=1, resume=checkpoint)


def test_a_run_that_goes_on_reports_from_there_on(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    again = resumed(config, "trackio")
    service.lines.clear()
    train(again)
    assert [step for step, values in service.lines if "train/loss" in values] == [3, 4, 5, 6, 7, 8]
    # that after the last step is made up for
    assert [step for step, values in service.lines if "val/loss" in values] == [2, 3, 4, 5, 6, 7, 8]
    started = len(service.started)
    train(replace(again, resume="auto"))
    assert len(service.started) == started
    assert "fails" not in Path(again.proj_dir, "train_log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_logger_that_fails_does_not_end_a_run(
    where: str, config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken, sound = Service("wandb", where), Service("trackio")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", sound)
    result = train(config(report_to=["wandb", "trackio"]))
    assert result.adapter is not None and result.adapter.exists()
    assert sound.ended == 1 and len(sound.lines) == result.steps + 2
    log = (tmp_path / "out" / "train_log.txt").read_text(encoding="utf-8")
    assert log.count("warning: wandb fails and is left out") == 1


def test_tensorboard_reads_what_was_written(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(config(report_to=["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [x.step for x in events.Scalars("train/loss")] == list(range(1, result.steps + 1))
    assert [x.value for x in events.Scalars("val/loss")] == pytest.approx(
        [x.loss for x in result.evaluations], rel=1e-6
    )


def test_tensorboard_shows_each_step_of_a_run_that_goes_on_once(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # its files are ordered by the second in which they were begun
    again = resumed(config, "tensorboard")
    time.sleep(1.1)
    train(again)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [x.step for x in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_logger_that_is_not_installed_is_one_line_before_training(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(ConfigError, match=r"pip install 'rwkv-peft\[swanlab\]'"):
        train(config(report_to=["swanlab"]))
    assert not Path(config().proj_dir).exists()


def test_an_old_line_names_a_project_of_wandb(
    cli: Callable[..., SimpleNamespace],
    config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    given = config()
    files = ["--load_model", given.load_model, "--data_file", given.data_file]
    more = ["--proj_dir", given.proj_dir, "--wandb", "old", "--epoch_steps", 1, "--epoch_count", 1]
    assert cli("train", *files, *more, "--merge", 0, "--report_to", "wandb").code == 0
    assert service.started[0]["project"] == "old" and service.lines
