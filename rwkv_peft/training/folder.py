"""Taking the folder of a run: for one process alone, and without the files of another run.

What a run wrote is known by its config.yaml, which says how its epochs are numbered, and by the
names of its files. All else in a folder is the user's, and is neither replaced nor removed.
"""

import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_peft.checkpoint.state import holds_state_alone
from rwkv_peft.checkpoint.tree import MANIFEST
from rwkv_peft.config import TEMPLATE_FILE
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.guard import find_clash
from rwkv_peft.training.settings import Settings
from rwkv_peft.writing import atomic_file
from rwkv_peft.yaml_file import read_yaml

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

DEFAULT_FOLDER = "out"
# held by the process of a run while it lasts, with its number and machine inside
LOCK = ".run.lock"
# where names are tried
TRIAL = ".run.trial"
# where Windows locks a byte: behind all content, which others could not read otherwise
_LOCKED_BYTE = 1 << 20
_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
# logs that are kept: a later run appends to them, or renames them
_KEPT = ("train_log.txt", "merge_report.json")
_KEPT_ALIKE = ("loss_data", "val_data", "val_samples")
_PLACES = ("*", "rwkv-*-adapter/*", "checkpoints/step-*/*", "checkpoints/step-*/rwkv-adapter/*")
_NAME = re.compile(
    r"(?P<log>(config\.yaml|train_log\.txt|template\.jinja"
    r"|(loss_data|val_data|val_samples)(-\d+)?\.jsonl)"
    r"|(checkpoints/step-\d+/)?merge_report\.json)"
    r"|checkpoints/step-\d+/(manifest\.json|run\.json|tensors\.safetensors)"
    r"|(checkpoints/step-\d+/rwkv|rwkv-(best|(?P<epoch>\d+)))"
    r"(\.pth|-(?P<state>.+)\.pth"
    r"|-adapter/(adapter_config\.json|adapter_model\.safetensors|rwkv_peft\.json))",
    re.DOTALL,
)


class Contents(NamedTuple):
    """What a folder holds of runs.

    Attributes:
        logs: its settings, losses and log.
        results: the weights, adapters and states that it saved.
        strangers: files that have the names of such files, but that no run is known to have
            written.
    """

    logs: list[Path]
    results: list[Path]
    strangers: list[Path]


class Claim:
    """A folder that no other run can take until this one ends."""

    def __init__(
        self, path: Path, *, overwrite: bool, inputs: Collection[Path], goes_on: bool
    ) -> None:
        self.path, self._overwrite, self._inputs = path, overwrite and not goes_on, inputs
        self._require_free(_list_contents(path), goes_on)

    def clear(self) -> None:
        """With `overwrite`, removes the files of the run that the folder held."""
        if not self._overwrite:
            return
        logs, results, _ = _list_contents(self.path)
        for path in (*logs, *results):
            if not self._is_template(path):
                _remove(path, self.path)

    def try_names(self, settings: Settings, endings: Collection[str]) -> None:
        """Makes files with the names that saving will use, and removes them.

        Args:
            endings: of the files of a save, behind rwkv-K.
        Raises:
            ConfigError: a name cannot be a file's here, or is taken already.
        """
        self._require_no_file(settings, endings)
        trial, last = self.path / TRIAL, settings.epoch_begin + settings.epoch_count - 1
        shutil.rmtree(trial, ignore_errors=True)
        try:
            for ending in endings:
                path = trial / f"rwkv-{last}{ending}"
                _try_name(path, trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def _require_free(self, contents: Contents, goes_on: bool) -> None:
        logs, results, strangers = contents
        folder, another = f"--proj_dir {self.path}", "give another --proj_dir"
        if results and not self._overwrite and not goes_on:
            is_resumable = any(path.name == MANIFEST for path in results)
            resume = ", or --resume auto to go on with it" * is_resumable
            raise ConfigError(
                f"{folder} holds a run ({_few(results, self.path)}): {another}{resume}, or "
                "--overwrite 1, which removes that run's files and no others"
            )
        strangers = [p for p in strangers if not self._is_template(p)]
        if strangers:
            raise ConfigError(
                f"{folder} holds {_few(strangers, self.path)}, and no config.yaml of the run that "
                f"wrote it: move it away, or {another}"
            )
        own = [p for p in (*logs, *results) if not self._is_template(p)]
        if self._overwrite and (clash := find_clash(own, self._inputs)):
            raise ConfigError(
                f"{folder} holds {_few([clash[0]], self.path)}, which this run reads and "
                f"--overwrite 1 would remove: {another}"
            )

    def _require_no_file(self, settings: Settings, endings: Collection[str]) -> None:
        results = set(_list_contents(self.path).results)
        epochs = range(settings.epoch_begin, settings.epoch_begin + settings.epoch_count)
        numbers = [*map(str, epochs), *["best"] * settings.is_evaluated]
        for path in self.path.glob("rwkv-*"):
            found = re.fullmatch(r"rwkv-(best|\d+)(.*)", path.name, re.DOTALL)
            if not found or found[1] not in numbers or found[2] not in endings:
                continue
            # of a folder all would be replaced, also what a user laid into it
            lost = {p for p in (path, *path.rglob("*")) if p.is_symlink() or not p.is_dir()}
            if lost := lost - results:
                raise ConfigError(
                    f"{min(lost)} would be replaced by this run: move it away, or give another "
                    "--proj_dir"
                )

    def _is_template(self, path: Path) -> bool:
        """Whether it is the template of this run, which stays where an earlier run left it."""
        return path.name == TEMPLATE_FILE and find_clash([path], self._inputs) is not None


@contextmanager
def take_folder(
    proj_dir: str,
    *,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    goes_on: bool = False,
) -> Iterator[Claim]:
    """Takes a folder for one run; folders that were made and stayed empty are removed at the end.

    Args:
        proj_dir: its path; the first of out, out-2, out-3 … that does not exist, if empty.
        overwrite: whether `Claim.clear` is to remove the run that the folder holds.
        inputs: files and folders that the run reads.
        goes_on: whether the run that the folder holds is this one, so that its files stay and
            take the new ones.
    Raises:
        ConfigError: another process has it, it holds another run, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            path = _take(proj_dir, stack)
        except OSError as error:
            raise ConfigError(
                f"cannot write in --proj_dir {error.filename or proj_dir}: {error.strerror}: give "
                "another --proj_dir"
            ) from error
        yield Claim(path, overwrite=overwrite, inputs=inputs, goes_on=goes_on)


def remove_results(folder: Path, stem: str) -> None:
    """Removes weights, adapters and states that the run of a folder saved under a name."""
    for path in _list_contents(folder).results:
        if re.match(rf"{re.escape(stem)}[.-]", path.relative_to(folder).parts[0]):
            _remove(path, folder)


def new_folders(stem: str) -> Iterator[Path]:
    """Makes the first of stem, stem-2, stem-3 … that does not exist, then the next."""
    for number in count(1):
        folder = Path(f"{stem}-{number}" if number > 1 else stem)
        try:
            # the one step that only one of several processes can take
            folder.mkdir()
        except FileExistsError:
            continue
        yield folder


@contextmanager
def new_folder(stem: str) -> Iterator[Path]:
    """Makes the first of stem, stem-2 … that does not exist; removes it if it stays empty."""
    folder = next(new_folders(stem))
    try:
        yield folder
    finally:
        _remove_empty(folder)


def _take(proj_dir: str, stack: ExitStack) -> Path:
    """Makes and locks the folder; `stack` undoes both."""
    if not proj_dir:
        for path in new_folders(DEFAULT_FOLDER):
            stack.callback(_remove_empty, path)
            with suppress(_InUseError):
                stack.enter_context(_lock(path))
                return path
    path = Path(proj_dir)
    for is_last in (False,) * 9 + (True,):
        try:
            for folder in (*reversed(path.parents), path):
                if not folder.is_dir():
                    with suppress(FileExistsError):
                        folder.mkdir()
                        stack.callback(_remove_empty, folder)
            stack.enter_context(_lock(path))
            break
        except FileNotFoundError:
            # a run that failed has just removed the folder that it had made
            if is_last:
                raise
    return path


class _InUseError(ConfigError):
    pass


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, at the latest until this process dies."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_descriptor(descriptor)
        except OSError as error:
            # file systems without locks say something else, and then nothing is locked
            if error.errno in _HELD:
                holder = _read_holder(descriptor)
                os.close(descriptor)
                raise _InUseError(
                    f"--proj_dir {folder} is in use by {holder}: wait for its end, or give another "
                    "--proj_dir"
                ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        # the run that had it has just ended and removed it
        os.close(descriptor)
    try:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        # removed while it is held, but for Windows, which removes nothing that is open
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            if sys.platform == "win32":
                path.unlink()


def find_holder(folder: Path) -> str:
    """The process of the run that has a folder, as it has written itself there; "" if none has."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return ""
    try:
        _lock_descriptor(descriptor)
    except OSError as error:
        return _read_holder(descriptor) if error.errno in _HELD else ""
    finally:
        os.close(descriptor)
    return ""


def _read_holder(descriptor: int) -> str:
    """Who holds a lock: its process writes that just after it got the lock."""
    for _ in range(20):
        os.lseek(descriptor, 0, os.SEEK_SET)  # Windows has no pread
        if holder := os.read(descriptor, 200).decode(errors="replace"):
            return holder
        time.sleep(0.05)
    return "another process"


def _lock_descriptor(descriptor: int) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _list_contents(folder: Path) -> Contents:
    found = Contents([], [], [])
    settings = read_settings(folder)
    epochs = settings and range(
        settings["epoch_begin"], settings["epoch_begin"] + settings["epoch_count"]
    )
    for path in sorted(p for place in _PLACES for p in folder.glob(place)):
        parts = _NAME.fullmatch(path.relative_to(folder).as_posix())
        if parts is None or path.is_dir():
            continue
        within = path.parents[: len(path.relative_to(folder).parts) - 1]
        is_own = epochs is not None and not any(p.is_symlink() for p in (path, *within))
        if epochs is not None and parts["epoch"]:
            is_own = is_own and int(parts["epoch"]) in epochs
        if parts["state"]:
            # other files of a user may well be called so
            if is_own and _is_state(path):
                found.results.append(path)
        elif is_own:
            (found.logs if parts["log"] else found.results).append(path)
        elif path.name not in _KEPT and not path.name.startswith(_KEPT_ALIKE):
            found.strangers.append(path)
    return found


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that wrote config.yaml in a folder, None if no run did."""
    try:
        settings = read_yaml(folder / "config.yaml")
    except ConfigError:
        return None
    is_own = isinstance(settings, dict) and "proj_dir" in settings
    numbers = ("epoch_begin", "epoch_count")
    return settings if is_own and all(isinstance(settings.get(n), int) for n in numbers) else None


def _try_name(path: Path, folder: Path) -> None:
    reason = "it names a folder" if path.parent != folder else ""
    try:
        reason = reason or "another has the same name here" * path.exists()
        if not reason:
            with atomic_file(path):
                pass
    except (ValueError, OSError) as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or str(cause)
    if reason:
        name = str(path.relative_to(folder))
        raise ConfigError(
            f"{name if len(name) < 100 else name[:100] + '…'} could not be saved: {reason}: give "
            "another --proj_dir, or other names of states"
        )


def _is_state(path: Path) -> bool:
    try:
        return holds_state_alone(path)
    except CheckpointError:
        return False


def _remove(path: Path, folder: Path) -> None:
    """Removes a file of a run's folder, and what folders within that it leaves empty."""
    path.unlink()
    for within in path.parents[: len(path.relative_to(folder).parts) - 1]:
        # stays if it holds a file of the user
        _remove_empty(within)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _few(paths: list[Path], folder: Path) -> str:
    names = list(dict.fromkeys(path.relative_to(folder).parts[0] for path in paths))
    return ", ".join(names[:3]) + " …" * (len(names) > 3)
