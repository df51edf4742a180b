"""The command starts a process for each device, and all of them end together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rwkv_peft.checkpoint.tree import find_damage
from rwkv_peft.cli import ranks
from rwkv_peft.language import choose_language

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")

SIZES = {"n_layer": 1, "n_embd": 64, "dim_att": 64, "dim_ffn": 64}


@pytest.fixture
def command(
    make_model_file: Callable[..., Path], make_data_file: Callable[..., Path], tmp_path: Path
) -> list[str]:
    model, data = make_model_file(**SIZES), make_data_file(["some words"] * 8)
    flags = {
        "proj_dir": tmp_path / "out",
        "devices": 2,
        "accelerator": "cpu",
        "precision": "fp32",
        "peft": "state",
        "micro_bsz": 1,
        "epoch_count": 100_000,
        "epoch_save": 100_000,
        "save_every_steps": 5,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "rwkv_peft.cli.main", "train", str(model), str(data), *words]


@contextmanager
def started(command: list[str], folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """A run that has made a checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=environment)
    try:
        until = time.monotonic() + 120
        while not list(folder.glob("checkpoints/step-*/manifest.json")):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        yield run
    finally:
        run.kill()
        run.communicate()


def find_rank(parent: int, rank: int) -> int:
    """The process of a rank that a command has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if is_child and f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError("there is no such process")


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    "flags",
    [
        [],
        # a rank is lost while others wait for its part of a block
        pytest.param(
            ["--strategy", "fsdp", "--peft", "none", "--dataload", "pad"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_is_killed_ends_all_with_one_message_and_a_whole_checkpoint(
    command: list[str], flags: list[str], tmp_path: Path
) -> None:
    folder, command = tmp_path / "out", [*command, *flags]
    with started(command, folder) as run:
        other = find_rank(run.pid, 0)
        os.kill(find_rank(run.pid, 1), signal.SIGKILL)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 2, told
    errors = [line for line in told.splitlines() if "error" in line or "Traceback" in line]
    assert len(errors) == 1 and "rank 1 of 2" in errors[0] and "SIGKILL" in errors[0]
    assert "--resume auto" in errors[0]
    assert not Path(f"/proc/{other}").exists()
    checkpoint = max(folder.glob("checkpoints/step-*"))
    assert not find_damage(checkpoint)
    step = int(checkpoint.name.removeprefix("step-"))
    epochs = str((step + 3) // 4 + 1)
    again = [*command, "--resume", "auto", "--epoch_count", epochs]
    again += ["--resume_changes", "epoch_count,warmup_steps"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"goes on after step {step:,}" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("signals", "words"),
    [
        # as a library may abort one that has lost another
        ({1: signal.SIGKILL, 0: signal.SIGABRT}, ("rank 1 of 2", "SIGKILL")),
        ({0: signal.SIGSEGV}, ("rank 0 of 2", "SIGSEGV")),
    ],
)
def test_the_command_tells_of_ranks_that_could_not(
    command: list[str], signals: dict[int, int], words: tuple[str, ...], tmp_path: Path
) -> None:
    with started(command, tmp_path / "out") as run:
        processes = {find_rank(run.pid, rank): number for rank, number in signals.items()}
        for process, number in processes.items():
            os.kill(process, number)
        _, told = run.communicate(timeout=60)
    errors = [line for line in told.splitlines() if line.startswith("error")]
    assert run.returncode == 2 and len(errors) == 1, told
    assert all(word in errors[0] for word in (*words, "--resume auto"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_all_and_is_named(
    rank: int, command: list[str], tmp_path: Path
) -> None:
    with started(command, tmp_path / "out") as run:
        ranks = [find_rank(run.pid, 0), find_rank(run.pid, 1)]
        os.kill(ranks[rank], signal.SIGSTOP)
        # a minute of patience, and some seconds for each to end
        _, told = run.communicate(timeout=100)
    errors = [line for line in told.splitlines() if line.startswith("error")]
    assert run.returncode == 2 and len(errors) == 1, told
    assert f"rank {rank} of 2" in errors[0] and "gave no sign of life for 60 s" in errors[0]
    assert "--resume auto" in errors[0]
    assert not any(Path(f"/proc/{process}").exists() for process in ranks)


def test_a_signal_to_the_command_stops_all_with_what_they_have_learned(
    command: list[str], tmp_path: Path
) -> None:
    with started(command, tmp_path / "out") as run:
        run.terminate()
        _, told = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert "stopped by signal 15" in told and "to go on" in told
    checkpoint = max((tmp_path / "out").glob("checkpoints/step-*"))
    assert not find_damage(checkpoint) and (checkpoint / "rwkv.pth").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_nodes", "2"], "srun"),
        (["--accelerator", "cpu:1"], "--accelerator cpu:1 is one device"),
        (["--strategy", "single"], "is for one device"),
        # where DeepSpeed is installed for its optimizer, or else for that
        (
            ["--strategy", "deepspeed_stage_3", "--optimizer", "lion"],
            "--strategy deepspeed_stage_3",
        ),
        (["--devices", "0"], "--devices must be above 0"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(
    command: list[str], flags: list[str], words: str
) -> None:
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0]


def test_the_first_rank_speaks_the_language_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[list[str]] = []

    class Process:
        def __init__(self, words: list[str], **options: object) -> None:
            began.append(words)

        def kill(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr("rwkv_peft.cli.ranks.subprocess.Popen", Process)
    choose_language("zh_CN")
    try:
        for rank in range(2):
            with ranks._started(["m.pth"], rank, 2, 1, None):  # type: ignore[arg-type]
                pass
    finally:
        choose_language("en")
    # what the others say is read, and said, by the command
    assert [words[3:] for words in began] == [
        ["--lang", "zh", "train", "m.pth"],
        ["--lang", "en", "train", "m.pth"],
    ]
