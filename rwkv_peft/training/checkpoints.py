"""Checkpoints of a run: what it needs to go on as if it had never stopped, written aside.

A checkpoint is a folder `checkpoints/step-NNNNNN` (see `checkpoint.tree`) with the values in
float32 and the moments of what is trained, the state of the method, the random generators, the
progress, the settings, and what tells whether base, data and program are still the same. The run
waits until all of it is in host memory; a thread writes it while training goes on.
"""

import platform
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rwkv_peft import __version__
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.checkpoint.tree import FILES, MANIFEST, write_tree
from rwkv_peft.data.fingerprint import hash_documents
from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.metrics import RunFolder, StepRecord, free_name
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.settings import Settings
from rwkv_peft.writing import atomic_folder

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)")


def folder_name(step: int) -> str:
    """The name of the checkpoint after a step, within the run's folder."""
    return f"{FOLDER}/step-{step:06d}"


def list_checkpoints(proj_dir: Path) -> list[Path]:
    """The folders of checkpoints in a run's folder, whole or not, from the newest."""
    found = [x for x in proj_dir.glob(f"{FOLDER}/*") if _NAME.fullmatch(x.name) and x.is_dir()]
    # others hold the weights of a run that was stopped
    found = [x for x in found if any((x / name).exists() for name in FILES)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made, by its name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else 0


def remove_checkpoint(folder: Path) -> None:
    """Removes the files of a checkpoint; what else the folder holds stays."""
    # the manifest as the first: without it the others are no checkpoint
    for name in sorted(FILES, key=lambda name: name != MANIFEST):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def is_on(settings: Settings) -> bool:
    """Whether a run makes checkpoints, beside that of an interruption."""
    return bool(settings.save_every_steps or settings.save_every_minutes)


def find_versions(device: torch.device) -> dict[str, str]:
    """What the bits of a run depend on beside its settings, base and data."""
    found = {"rwkv-peft": __version__, "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["peft"] = version("peft")
    is_cpu = device.type == "cpu"
    name = platform.machine() if is_cpu else torch.get_device_module(device).get_device_name(device)
    found["device"] = str(name)
    if is_cpu:
        found["threads"] = str(torch.get_num_threads())
    return found


class Checkpoints:
    """Makes the checkpoints of a run when they are due, and keeps the newest.

    Args:
        last: the one that the run goes on from, None if it begins.

    Attributes:
        last: the newest that is whole.
        step: the step of the newest that was begun.
    """

    def __init__(self, run: Run, folder: RunFolder, last: Path | None = None) -> None:
        settings = run.settings
        self._run, self._folder, self._settings = run, folder, settings
        self._base = fingerprint(read_weights(settings.load_model))
        self._versions = find_versions(run.device)
        self._data: dict[str, str] = {}
        self._writing: Future[Path] | None = None
        self._last_time = time.monotonic()
        self.last, self.step = last, run.progress.step

    def is_due(self) -> bool:
        """Whether the run is where a checkpoint is wanted; at its end one always is."""
        settings, step = self._settings, self._run.progress.step
        every, minutes = settings.save_every_steps, settings.save_every_minutes
        return (
            (every > 0 and step % every == 0)
            or (minutes > 0 and time.monotonic() - self._last_time >= minutes * 60)
            or (is_on(settings) and self._run.is_done)
        )

    def save(self, record: StepRecord, *, is_saving: bool = False) -> None:
        """Copies the run to host memory, and has a thread write it; waits for the one before.

        Args:
            is_saving: files of an epoch are being written, and not yet whole.
        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._last_time = time.monotonic()
        tree = {**self._describe(record), "is_saving": is_saving}
        step = self._run.progress.step
        self._writing, self.step = Future(), step
        Thread(target=self._work, args=(self._writing, tree, step), daemon=True).start()

    def wait(self) -> None:
        """Waits until the last is written.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            self.last = writing.result()

    def require_written(self) -> None:
        """Raises the error of a checkpoint that could not be written, without waiting for one."""
        if self._writing and self._writing.done():
            self.wait()

    def discard_later(self, step: int) -> None:
        """Removes checkpoints of later steps, which another course of the run has made."""
        for folder in list_checkpoints(self._folder.path):
            if step_of(folder) > step:
                remove_checkpoint(folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # who presses Ctrl-C twice waits for nothing
        if isinstance(error, Exception):
            with suppress(CheckpointError):
                self.wait()

    def _describe(self, record: StepRecord) -> dict[str, Any]:
        run = self._run
        saved = run.saved
        run.strategy.ask("state")
        files = (saved.weights, saved.adapter) if saved else (None, None)
        return {
            "step": run.progress.step,
            "micro_batches": len(run.plan.batches),
            "settings": {**asdict(self._settings), "resume": "", "resume_changes": []},
            "base": self._base,
            "versions": self._versions,
            "logs": self._folder.lengths(),
            "metrics": asdict(record),
            "saved": [x and str(x.relative_to(self._folder.path)) for x in files],
            "saved_loss": run.saved_loss,
            "run": copy_to_host(run.state_dict(), run.device),
        }

    def _work(self, future: "Future[Path]", tree: dict[str, Any], step: int) -> None:
        where = self._folder.path / folder_name(step)
        try:
            future.set_result(self._write(tree, where))
        except OSError as error:
            message = f"cannot write {error.filename or where}: {error.strerror}"
            future.set_exception(CheckpointError(message))
        except CheckpointError as error:
            future.set_exception(error)
        finally:
            # whatever it was, nobody waits for ever
            if not future.done():
                future.set_exception(CheckpointError(f"cannot write {where}"))

    def _hash_data(self) -> dict[str, str]:
        validation = self._run.validation
        return {
            "data": hash_documents(self._run.plan.batches.documents),
            "held_out": hash_documents(validation.documents if validation else None),
        }

    def _write(self, tree: dict[str, Any], path: Path) -> Path:
        self._data = self._data or self._hash_data()
        self._folder.flush()
        with atomic_folder(path) as new:
            write_tree(new, {**tree, **self._data})
            if path.is_dir() and any(x.name not in FILES for x in path.iterdir()):
                # of a course of the run that was given up: what was learned there stays
                remove_checkpoint(path)
                path.rename(free_name(path))
        if keep := self._settings.keep:
            whole = [x for x in list_checkpoints(self._folder.path) if step_of(x) <= step_of(path)]
            for folder in whole[keep:]:
                remove_checkpoint(folder)
        return path


def copy_to_host(tree: Any, device: torch.device) -> Any:
    """A tree of containers with its tensors copied to host memory, one wait for their device."""
    copies = _copy(tree)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return copies


def _copy(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True, non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: _copy(x) for key, x in tree.items()}
    return [_copy(x) for x in tree] if isinstance(tree, (list, tuple)) else tree
