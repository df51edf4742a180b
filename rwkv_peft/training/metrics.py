"""What a run writes while it goes on: the logs in its folder."""

import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_peft.config import TEMPLATE_FILE
from rwkv_peft.device import process_memory
from rwkv_peft.training.settings import Settings
from rwkv_peft.training.validation import Evaluation, Sample
from rwkv_peft.writing import atomic_file, flush

# a line a step, an evaluation and an answer; and what was printed
LOSSES, EVALUATIONS, SAMPLES = "loss_data.jsonl", "val_data.jsonl", "val_samples.jsonl"
LOG = "train_log.txt"
LOGS = (LOSSES, EVALUATIONS, SAMPLES, LOG)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, as a line of loss_data.jsonl.

    Attributes:
        loss: cross-entropy in nats, the mean over the step's trained tokens by their weights.
        tokens: positions of all micro-batches, without padding.
        trained_tokens: those with a loss.
        t_cost: seconds.
        kt_s: thousands of `tokens` a second.
        peak_memory: most bytes allocated on the device so far; on a CPU, held by the process.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    t_cost: float
    kt_s: float
    peak_memory: int


class LogPlaces(NamedTuple):
    """Where the logs of a run stood.

    Attributes:
        folder: that they are in.
        lengths: their bytes at that time, by name.
    """

    folder: Path
    lengths: Mapping[str, int]


class RunFolder:
    """The logs of a run in `proj_dir`, which are not made before the first step is recorded.

    Lines of JSON of an earlier run are renamed, not overwritten. A run that goes on appends to its
    own logs, as they were where it goes on: what was written after that is cut off.

    Args:
        places: of the logs of a run that goes on.
    """

    def __init__(self, folder: str | Path, *, places: LogPlaces | None = None) -> None:
        self.path = Path(folder)
        if places and places.folder.exists() and places.folder.samefile(self.path):
            # however it was spelled
            places = places._replace(folder=self.path)
        self._places = places
        self._files = {name: _GrowingFile(self.path / name) for name in LOGS}
        started = f"run begins {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self._waiting: list[tuple[str, str]] | None = [(LOG, started)]
        self._introduction = 1

    def write_config(self, settings: Settings) -> None:
        """Saves all settings as config.yaml, which `--config` reads again.

        A user's template is copied beside it, so that it stays what the model was trained with.
        """
        import yaml

        # who repeats the run has not said that its results may go
        settings = replace(settings, overwrite=0, resume="", resume_changes=[])
        copy = self.path / TEMPLATE_FILE
        if (template := Path(settings.template)).is_file():
            source = template.read_bytes()
            with atomic_file(copy) as file:
                file.write(source)
            settings = replace(settings, template=str(copy))
        with atomic_file(self.path / "config.yaml", "w") as file:
            yaml.safe_dump(asdict(settings), file, sort_keys=False, allow_unicode=True)

    @property
    def problem(self) -> str:
        """Why lines wait to be written, such as a full disk; "" if none does."""
        return next((file.problem for file in self._files.values() if file.problem), "")

    def log(self, line: str) -> None:
        """Appends a line to train_log.txt."""
        self._append(LOG, line)

    def introduce(self) -> None:
        """Takes what was logged so far for an introduction, which a log that goes on has."""
        self._introduction = len(self._waiting or ())

    def begin(self) -> None:
        """Makes the logs, and writes what was logged so far."""
        if self._waiting is None:
            return
        for name, file in self._files.items():
            if self._places:
                _cut(self._places.folder / name, file.path, self._places.lengths)
            elif name != LOG and file.path.exists():
                file.path.rename(free_name(file.path))
        goes_on = self._places and any(self._places.lengths.values())
        waiting, self._waiting = self._waiting[self._introduction if goes_on else 0 :], None
        for name, line in waiting:
            self._append(name, line)

    def given_up(self, name: str) -> str:
        """What a log of this folder holds behind the place where a run goes on."""
        path = self._files[name].path
        if not self._places or self._places.folder != self.path or not path.exists():
            return ""
        return path.read_bytes()[self._places.lengths.get(name, 0) :].decode(errors="replace")

    def lengths(self) -> dict[str, int]:
        """Bytes of each log so far, by name."""
        return {name: file.length for name, file in self._files.items()}

    def flush(self) -> None:
        """Has the disk take in what was written to the logs."""
        for file in self._files.values():
            if file.path.exists():
                flush(file.path)

    def record(self, record: StepRecord) -> None:
        """Appends a step to loss_data.jsonl."""
        self.begin()
        self._append(LOSSES, json.dumps(asdict(record)))

    def record_evaluation(self, evaluation: Evaluation | None, samples: Sequence[Sample]) -> None:
        """Appends an evaluation to val_data.jsonl, and answers to val_samples.jsonl."""
        if evaluation:
            self._append(EVALUATIONS, json.dumps(asdict(evaluation)))
        for sample in samples:
            self._append(SAMPLES, json.dumps(sample._asdict(), ensure_ascii=False))

    def _append(self, name: str, line: str) -> None:
        if self._waiting is None:
            self._files[name].append(line)
        else:
            self._waiting.append((name, line))

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


class _GrowingFile:
    """A file of lines that keeps what a full disk does not take until there is room again.

    Attributes:
        problem: why lines wait, "" if none does.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self._file: io.FileIO | None = None
        self._unwritten = b""

    @property
    def length(self) -> int:
        """Bytes of the file, once all has been written."""
        return (self.path.stat().st_size if self.path.exists() else 0) + len(self._unwritten)

    def append(self, line: str) -> None:
        """Writes a line at the end."""
        self._unwritten += line.encode(errors="backslashreplace") + b"\n"
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 closed by `close`
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self.problem = ""
        except OSError as error:
            self.problem = f"cannot write {self.path}: {error.strerror}"

    def close(self) -> None:
        """Closes it; what the disk did not take is lost."""
        if self._file is not None:
            self._file.close()


def _cut(source: Path, target: Path, lengths: Mapping[str, int]) -> None:
    """Makes a log what another was when it had so many bytes, without a line that is not whole."""
    if source != target and source.exists():
        shutil.copyfile(source, target)
    if not target.exists():
        return
    with open(target, "r+b") as file:
        file.truncate(min(lengths.get(target.name, 0), target.stat().st_size))
        if rest := len(file.read().rpartition(b"\n")[2]):
            file.truncate(file.tell() - rest)


def free_name(path: Path) -> Path:
    """The first of NAME-1, NAME-2 … beside a path that is not taken."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def peak_memory(device: torch.device) -> int:
    """Most bytes that tensors have held on an accelerator, or the process on a CPU.

    0 where nobody counts.
    """
    if device.type == "cpu":
        return process_memory()
    try:
        return torch.accelerator.max_memory_allocated(device)
    except RuntimeError:
        # some accelerators have no allocator that keeps count
        return 0
