"""A terminal that breaks ends no run, and changes no exit code."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.config import TrainConfig
from rwkv_peft.terminal import Unbreakable
from rwkv_peft.training.display import Display
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.run import train


class Breaking(io.StringIO):
    """A stream that fails from its n-th write on."""

    def __init__(
        self, error: type[Exception], count: int = 0, *, is_terminal: bool = False
    ) -> None:
        super().__init__()
        self.error, self.left, self._is_terminal = error, count, is_terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error(5, "broken")
        return super().write(text)

    def flush(self) -> None:
        if self.left < 0:
            raise self.error(5, "broken")

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_goes_on_without_its_stream(
    error: type[Exception], is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Breaking(error, 2, is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with Display() as display:
        display.begin(3)
        for step in range(3):
            display.line("a line")
            display.update(StepRecord(step + 1, 0, 1.0, 0.1, 1.0, 5, 5, 0.1, 0.05, 0))
    assert stream.left < 0


def test_a_stream_that_is_missing_or_closed_takes_everything() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        safe = Unbreakable(stream)
        print("text", file=safe, flush=True)
        assert not safe.isatty() and safe.encoding == "utf-8"


def test_a_run_with_no_terminal_at_all_gives_its_files(
    model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        epoch_count=1,
        epoch_steps=1,
        accelerator="cpu",
    )
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", Breaking(OSError))
    result = train(config)
    assert result.weights is not None and result.weights.exists()
    assert "epoch 0: loss" in (tmp_path / "out" / "train_log.txt").read_text()


@pytest.mark.parametrize("form", ["2>&1 | head -1", "2>/dev/full", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.skipif(sys.platform != "linux", reason="has /dev/full, and a shell")
def test_a_command_exits_as_it_would_have(
    form: str, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "rwkv_peft.cli.main", "train", str(model_file), str(data_file)]
    words += ["--epoch_count", "1", "--epoch_steps", "1", "--proj_dir", str(tmp_path / "out")]
    line = " ".join(f"'{word}'" for word in words) + f" {form}; exit ${{PIPESTATUS[0]}}"
    for code in (0, 2):
        # the second finds the folder taken, and cannot say so
        assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == code
    assert "epoch 0: loss" in (tmp_path / "out" / "train_log.txt").read_text()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"rwkv-0.pth", "rwkv-0-adapter", "config.yaml"} <= files and len(files) == 6


def test_a_full_disk_for_the_logs_is_told_once_and_loses_no_line(
    cli: Callable[..., SimpleNamespace],
    model_file: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rwkv_peft.training import metrics

    calls = 0

    class Filling(io.FileIO):
        """Takes a part of a line, then nothing for a while."""

        def write(self, content: Any) -> int:
            nonlocal calls
            calls += 1
            if 40 < calls < 60:
                raise OSError(28, os.strerror(28))
            return super().write(content[:100])

    def open_filling(path: Path, mode: str, buffering: int = 0) -> Filling:
        assert (mode, buffering) == ("ab", 0)
        return Filling(path, "ab")

    monkeypatch.setattr(metrics, "open", open_filling, raising=False)
    settings = ("--epoch_count", 2, "--micro_bsz", 1, "--ctx_len", 16)
    done = cli("train", model_file, data_file, "--proj_dir", tmp_path / "out", *settings)
    assert done.code == 0, done.err
    assert done.err.count("No space left on device: training goes on") == 1
    lines = (tmp_path / "out" / "loss_data.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert "run begins" in (tmp_path / "out" / "train_log.txt").read_text()
