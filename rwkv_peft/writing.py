"""Files and folders that are written whole or not at all, and where caches are kept.

New content grows under a temporary name beside its target, is flushed to the disk and takes the
target's name in one step; then the folder that holds the name is flushed too. A writer that was
killed leaves its temporary behind, and the next writer in that folder removes it. A lock tells
that its owner is dead: every writer holds a shared lock on the folder, and only one that gets the
exclusive lock removes anything. Some network file systems keep locks within one machine, so a
temporary's name also says which machine made it, and other machines leave it alone.
"""

import ctypes
import errno
import os
import platform
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

from rwkv_peft.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
# what `os.rename` says of a target that is there and not an empty folder
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
# arguments of renameat2: names relative to the working directory; the flag that swaps them, which
# renamex_np of macOS calls RENAME_SWAP
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file object whose content becomes `path` at the end, or not at all.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; `path` is as it was.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def atomic_files(*paths: Path) -> Iterator[Sequence[IO[bytes]]]:
    """File objects whose contents become files that belong together, all of them or none.

    Each complete file is renamed to `.NAME.next`, and the last of these renames decides. Then the
    last of `paths` is removed, and all take their names, it again as the last: at no moment do an
    old file and a new one stand together. If the writer dies after it was decided, the next writer
    or `restore_files` finishes.

    Args:
        paths: in one folder. Of the last no reader may do without.
    Raises:
        CheckpointError: the folder cannot be written or the disk is full.
    """
    with ExitStack() as stack:
        # the first, which is the largest, as the innermost: an error names it
        names = {path: stack.enter_context(_temporary(path)) for path in reversed(paths)}
        temporaries = [names[path] for path in paths]
        with ExitStack() as opened:
            files = [opened.enter_context(open(name, "wb")) for name in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        # of a dead writer: a mixture of its files and ours could be decided otherwise
        restore_files(*paths)
        try:
            for temporary, path in zip(temporaries, paths, strict=True):
                os.replace(temporary, _next(path))
        except OSError:
            for path in paths:
                _remove(_next(path))
            raise
        try:
            restore_files(*paths)
        except OSError as error:
            raise CheckpointError(
                f"cannot finish {paths[-1]}: {error.strerror or error}. It takes its name when it "
                "is next opened"
            ) from error


def restore_files(*paths: Path) -> None:
    """Gives files that belong together their names, if a writer died after they were complete."""
    *others, last = paths
    with suppress(FileNotFoundError), _hold(_next(last)):
        last.unlink(missing_ok=True)
        flush(last.parent)
        for path in others:
            # moved already, if a writer died here
            with suppress(FileNotFoundError):
                os.replace(_next(path), path)
        flush(last.parent)
        os.replace(_next(last), last)
        flush(last.parent)


@contextmanager
def atomic_folder(path: str | Path, *, keeps_first: bool = False) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` at the end, or not at all.

    What had that name before is removed with all that it holds. Linux and macOS swap the two names
    in one step. Where that is not possible, `path` is missing for a moment; if the writer dies in
    it, the next writer or `restore_folder` gives the old folder its name back.

    Args:
        keeps_first: a folder that has the name by then stays, and the new one is removed.
    Raises:
        CheckpointError: the folder cannot be written or the disk is full; `path` is as it was.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in (*names, ""):
                flush(Path(folder, name))
        _put_in_place(temporary, path, keeps_first)


def restore_folder(path: Path) -> None:
    """Gives a folder its name back, if a writer died while it replaced the folder."""
    if not path.exists():
        for old in path.parent.glob(f".{escape(path.name)}.{'?' * 16}.old"):
            with suppress(OSError):
                os.rename(old, path)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer takes, for its unfinished content."""
    return path.with_name(f".{path.name}.{_MACHINE}{secrets.token_hex(4)}.tmp")


def cache_folder(*parts: str) -> Path:
    """The folder of this program, or one within it, where the system keeps a user's caches."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / usual
    return Path(root, "rwkv-peft", *parts)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name for the content of `path`, which the caller moves to `path` at the end."""
    temporary = temporary_name(path)
    kept = ""
    try:
        _make_folders(path.parent)
        with _lock(path.parent):
            if path.exists():
                kept = f"; the previous {'folder' if path.is_dir() else 'file'} is untouched"
            try:
                yield temporary
                kept = ""
                flush(path.parent)
            finally:
                # the unfinished content, or what had the name before
                _remove(temporary)
                _remove(temporary.with_suffix(".old"))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}{kept}. Free space or choose another "
            "folder"
        ) from error


def _next(path: Path) -> Path:
    return path.with_name(f".{path.name}.next")


@contextmanager
def _hold(path: Path) -> Iterator[None]:
    """Keeps others that hold a file waiting.

    Raises:
        FileNotFoundError: it is not there, or was moved meanwhile.
    """
    if sys.platform == "win32":
        # which moves no open file
        path.stat()
        yield
        return
    with open(path, "rb") as file:
        # a file system may have no locks
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lets other writers know that this one is alive, once the leftovers of dead ones are gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        # always on Windows, which opens no folder: leftovers stay there
        yield
        return
    try:
        # refused while others write, or by a file system without locks
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for rest in folder.glob(f".*.{_MACHINE}{'?' * 8}.*"):
                if rest.suffix == ".old":
                    restore_folder(rest.with_name(rest.name[1 : -len(f".{'?' * 16}.old")]))
                if rest.suffix in (".old", ".tmp"):
                    _remove(rest)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _make_folders(folder: Path) -> None:
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def flush(path: Path) -> None:
    """Has the disk take in the content of a file, or the names in a folder."""
    is_folder = path.is_dir()
    try:
        # Windows flushes only files opened for writing
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        # always on Windows, which opens no folder
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot flush a folder
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, path: Path, keeps_first: bool) -> None:
    """Moves `new` to `path`, and what was there to the name of `new` or to an `.old` beside it."""
    old = new.with_suffix(".old")
    try:
        while True:
            try:
                os.rename(new, path)
                return
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            if keeps_first or _swap(new, path):
                return
            # in the loop, as another writer may move its own folder there or away at any time
            _remove(old)
            with suppress(FileNotFoundError):
                os.rename(path, old)
    finally:
        restore_folder(path)


def _swap(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    a, b, library = os.fsencode(one), os.fsencode(other), None
    if sys.platform in ("linux", "darwin"):
        library = ctypes.CDLL(None)
    failed = 1
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(a, b, _RENAME_EXCHANGE)
    return failed == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
