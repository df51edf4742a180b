"""Saves of large models are written while training goes on."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import rwkv_peft
from rwkv_peft.checkpoint import apart
from rwkv_peft.checkpoint.merge import merge
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.training import target
from rwkv_peft.training.recorder import Recorder
from rwkv_peft.training.run import train
from tests.training.test_loop import losses

Make = Callable[..., TrainConfig]


@pytest.fixture
def make_config(make_model_file: Callable[..., Path], tmp_path: Path, make_data_file: Any) -> Make:
    def make(name: str, **changes: Any) -> TrainConfig:
        values = {
            "load_model": str(make_model_file()),
            "data_file": str(make_data_file(["one text", "another", "a third"])),
            "proj_dir": str(tmp_path / name),
            "peft_config": {"r": 4, "lora_dropout": 0.3},
            "dataload": "pad",
            "micro_bsz": 1,
            "epoch_count": 3,
            "lr_init": 1e-2,
            "accelerator": "cpu",
            "precision": "bf16",
            "random_seed": 0,
        }
        return TrainConfig(**{**values, **changes})

    return make


def files(folder: Path) -> dict[str, bytes]:
    """All weights and adapters of a run."""
    found = [p for p in folder.rglob("rwkv-*") if p.is_file()]
    found += [p for p in folder.rglob("*-adapter/*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_files_and_losses_are_those_of_a_run_that_waits(
    peft: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {} if peft == "lora" else {"peft_config": {}}
    # one epoch aside is one process, which takes seconds to start
    changes |= {"peft": peft, "epoch_count": 2 if peft == "lora" else 4}
    train(make_config("waits", **changes))
    monkeypatch.setattr(target, "ASIDE", 0)
    result = train(make_config("aside", **changes))
    one, other = files(tmp_path / "waits"), files(tmp_path / "aside")
    assert one.keys() == other.keys() and len(one) > 1
    assert all(one[name] == other[name] for name in one)
    assert losses(tmp_path / "waits") == losses(tmp_path / "aside")
    log = (tmp_path / "aside" / "train_log.txt").read_text()
    stem = tmp_path / "aside" / "rwkv-0"
    assert f", saving {stem} while training goes on\n" in log
    assert f"\nsaved {stem}.pth" in log
    assert result.weights == tmp_path / "aside" / f"rwkv-{changes['epoch_count'] - 1}.pth"


def test_training_goes_on_while_files_are_written_from_a_copy(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a merge in this process would draw from the generator of dropout
    changes = {"peft_config": {"r": 4}}
    train(make_config("waits", **changes))
    monkeypatch.setattr(target, "ASIDE", 0)
    steps, go_on = [0], Event()
    log = Recorder.log

    def count(self: Recorder, run: Any, record: Any) -> None:
        log(self, run, record)
        steps[0] = record.step
        if record.step == 5:
            go_on.set()

    def merge_late(*given: Any, **options: Any) -> Any:
        assert go_on.wait(60) and steps[0] >= 5
        return merge(*given, **options)

    monkeypatch.setattr(Recorder, "log", count)
    monkeypatch.setattr(target, "merge_apart", merge_late)
    train(make_config("aside", **changes))
    assert files(tmp_path / "aside") == files(tmp_path / "waits")


def test_a_failure_of_the_writer_ends_the_run_in_the_next_steps(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "rwkv-0.pth")

    monkeypatch.setattr(target, "ASIDE", 0)
    monkeypatch.setattr(target, "merge_apart", fail)
    with pytest.raises(CheckpointError, match=r"cannot write rwkv-0\.pth: No space left"):
        train(make_config("out", epoch_count=50))
    assert 3 <= len(losses(tmp_path / "out")) < 100
    assert (tmp_path / "out" / "rwkv-0-adapter").is_dir()
    assert not (tmp_path / "out" / "rwkv-0.pth").exists()


def test_a_signal_waits_for_what_is_being_written(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Recorder.log
    go_on = Event()

    def stop(self: Recorder, run: Any, record: Any) -> None:
        log(self, run, record)
        if record.step == 4:
            signal.raise_signal(signal.SIGTERM)
            go_on.set()

    def merge_late(*given: Any, **options: Any) -> Any:
        assert go_on.wait(60)
        return merge(*given, **options)

    monkeypatch.setattr(target, "ASIDE", 0)
    monkeypatch.setattr(target, "merge_apart", merge_late)
    monkeypatch.setattr(Recorder, "log", stop)
    result = train(make_config("out"))
    assert result.signal == signal.SIGTERM and result.steps == 4
    folder = tmp_path / "out"
    assert (folder / "rwkv-0.pth").exists() and not (folder / "rwkv-1.pth").exists()
    assert result.weights == folder / "checkpoints" / "step-000004" / "rwkv.pth"
    assert result.weights.exists()


def test_a_model_that_is_merged_in_a_moment_is_not_put_aside(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(target, "merge_apart", None)
    train(make_config("small"))
    # nor one that has no room beside itself
    monkeypatch.setattr(target, "ASIDE", 0)
    monkeypatch.setattr(target, "free_host_memory", lambda: 1000)
    train(make_config("crowded"))
    assert files(tmp_path / "small") == files(tmp_path / "crowded")


def test_the_process_ends_with_its_parent_and_tells_errors(
    make_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config("out")
    given = [config.load_model, str(tmp_path / "none"), str(tmp_path / "m.pth"), {}, 1]
    command = [sys.executable, "-m", apart.__name__, json.dumps(given)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "m.pth").exists()
    monkeypatch.setattr(sys, "argv", ["apart", json.dumps(given)])
    monkeypatch.setattr(apart, "_end_with_parent", lambda: None)
    apart.main()
    assert "there is no adapter" in json.loads(capsys.readouterr().out)["error"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "broken"))
    (tmp_path / "broken").write_text("#!/bin/sh\necho oh no >&2\nexit 3\n")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(CheckpointError, match=r"could not be merged \(oh no\): rwkv-peft merge"):
        apart.merge_apart(config.load_model, "a", tmp_path / "m.pth")
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(CheckpointError, match="there is no adapter"):
        apart.merge_apart(config.load_model, tmp_path / "a", tmp_path / "m.pth")
    assert callable(rwkv_peft.merge)
