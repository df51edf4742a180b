"""Signals end a run with what it learned, or before it began with nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import Stopped
from rwkv_peft.training import run as training
from rwkv_peft.training.interrupt import SIGNALS, Interrupt
from rwkv_peft.training.run import train
from rwkv_peft.training.step import full_step
from rwkv_peft.training.validator import Validator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


@pytest.fixture(autouse=True)
def _hang_up_is_heard() -> Iterator[None]:
    """Under nohup the signal is ignored, here and in what is started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def config(model_file: Path, data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        peft_config={"r": 2},
        peft="lora",
        epoch_count=2,
        micro_bsz=2,
        ctx_len=16,
        precision="fp32",
        accelerator="cpu",
        random_seed=0,
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_step_saves_what_it_learned(number: int, config: TrainConfig) -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}

    def stepping(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.Signals(number))
        # a terminal that closes may send a second one
        if number != signal.SIGINT:
            signal.raise_signal(signal.Signals(number))
        return full_step(*args, **options)

    result = train(config, step=stepping)
    assert (result.signal, result.steps) == (number, 1)
    assert result.weights == result.proj_dir / "checkpoints" / "step-000001" / "rwkv.pth"
    assert list(read_weights(result.weights)) == list(read_weights(config.load_model))
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_raises_and_leaves_nothing(
    number: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepare = training.prepare_run

    def prepare_slowly(*args: Any, **options: Any) -> Any:
        found = prepare(*args, **options)
        signal.raise_signal(signal.Signals(number))
        return found

    monkeypatch.setattr(training, "prepare_run", prepare_slowly)
    with pytest.raises(Stopped) as caught:
        train(config)
    assert caught.value.signal == number
    assert not (tmp_path / "out").exists()


def test_a_signal_in_a_save_lets_it_end(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_peft.training import target

    merge = target.merge

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return merge(*args, **options)

    monkeypatch.setattr(target, "merge", interrupted)
    result = train(config)
    assert result.signal == signal.SIGTERM
    assert (result.proj_dir / "rwkv-0.pth").exists()
    assert (result.proj_dir / "rwkv-0-adapter" / "adapter_model.safetensors").exists()
    assert not [p for p in result.proj_dir.rglob(".*")]


@pytest.mark.parametrize("number", [signal.SIGHUP])
def test_a_signal_in_an_evaluation_saves_and_the_run_goes_on(
    number: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, val_split=0.3, val_every_steps=1)
    whole = train(replace(config, proj_dir=f"{config.proj_dir} whole"))
    evaluate, calls = Validator.evaluate, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.Signals(number))
        evaluate(*args)

    monkeypatch.setattr(Validator, "evaluate", interrupted)
    result = train(config)
    assert result.signal == number
    assert 0 < result.steps < whole.steps
    assert not [p for p in result.proj_dir.rglob(".*") if p.name != ".run.lock"]
    resumed = train(replace(config, resume="auto"))
    assert resumed.weights and whole.weights
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()


def test_a_second_ctrl_c_stops_at_once_and_an_ignored_signal_stays_ignored() -> None:
    with Interrupt() as interrupt:
        interrupt.defer()
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_still_reading_ends_with_one_line_and_its_code(
    number: signal.Signals, model_file: Path, tmp_path: Path
) -> None:
    # a pipe that never ends
    os.mkfifo(tmp_path / "data.jsonl")
    command = [sys.executable, "-m", "rwkv_peft.cli.main", "train", str(model_file)]
    command += [str(tmp_path / "data.jsonl"), "--proj_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline, writer = time.monotonic() + 120, -1
    while writer < 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        # there is no writer as long as there is no reader
        with contextlib.suppress(OSError):
            writer = os.open(tmp_path / "data.jsonl", os.O_WRONLY | os.O_NONBLOCK)
    # it waits for a line by then
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, errors) == (128 + number, "stopped\n")
    assert not (tmp_path / "out").exists()


def test_the_first_step_is_reached_by_every_signal_of_the_shell(
    cli: Callable[..., Any], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "prepare_run", stopping)
    done = cli("train", config.load_model, config.data_file, "--proj_dir", config.proj_dir)
    assert (done.code, done.err) == (128 + signal.SIGTERM, "stopped\n")
