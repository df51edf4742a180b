"""What is to be written takes the place of nothing that the user may miss."""

import os
import re
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from rwkv_peft.errors import ConfigError
from rwkv_peft.writing import temporary_name

# options of files that are read by their bytes, whatever their names
_READ_BY_BYTES = ("data_file", "val_file", "val_prompts")
# options that are words of a user
_FREE_TEXTS = ("prompt", "user", "system", "wandb")
# a path of Windows: whole, and what a shell leaves of one without quotes
_DRIVE = re.compile(r"([A-Za-z]):([\\/].*|[\w.-]+\.\w+)", re.DOTALL)
_SHARE = re.compile(r"[\\/]{2}wsl(?:\$|\.localhost)[\\/][^\\/]+(.*)", re.DOTALL)
# files and folders that are told from others by more than their paths
_Identity = tuple[int, int]


def require_free(
    output: str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    owned: Collection[str] | None = None,
    flag: str = "--output",
) -> None:
    """Raises unless a file or a folder can be written and nothing is lost by it.

    An input is never written over, by whatever path it is reached; nor is what is no regular file,
    such as a device; nor a folder that holds anything of the user's. What is there already is
    replaced only with `overwrite`.

    Args:
        output: a file, or a folder if `owned` is given.
        inputs: files that are read, and folders of which any file may be; empty names are not.
        owned: names that this program writes in the folder.
        flag: how the user named it, for messages.
    Raises:
        ConfigError: with what stands in the way.
    """
    path, named = Path(output), f"{flag} {output}"
    try:
        # a file that is made first has a longer name
        temporary_name(path).exists()
        is_there = os.path.lexists(path)
        mode = path.stat().st_mode if path.exists() else 0
        foreign = set(os.listdir(path)) - set(owned or ()) if stat.S_ISDIR(mode) else set()
        clash = find_clash([path], inputs)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{named} cannot be written: {reason}; choose another name") from error
    if clash:
        raise ConfigError(f"{named} is or holds {clash[1]}, which is read: choose another name")
    _require_writable(path.parent, named)
    if mode and not (stat.S_ISREG(mode) if owned is None else stat.S_ISDIR(mode)):
        wanted = "regular file" if owned is None else "folder"
        raise ConfigError(f"{named} is there and no {wanted}: choose another name")
    if foreign:
        raise ConfigError(
            f"{named} holds other files too ({', '.join(sorted(foreign)[:3])}), which would be "
            "removed: move them, or choose another name"
        )
    if is_there and not overwrite:
        raise ConfigError(f"{named} exists: choose another name, or give --overwrite 1")


def require_paths(options: Any) -> None:
    """Raises ConfigError if a text in a dataclass of options can be no path that was meant.

    None of them holds NUL. A `~` that no shell has read would become a folder of that name, and so
    would a path of Windows elsewhere.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        for part in value.split(",") if isinstance(value, str) else ():
            if "\0" in part:
                raise ConfigError(f"--{item.name}: a NUL character is in no path")
            is_free = item.name in (*_FREE_TEXTS, *_READ_BY_BYTES)
            if not is_free and any("\ud800" <= x <= "\udfff" for x in part):
                raise ConfigError(
                    f"--{item.name} {part}: this name is not in UTF-8, which those who read and "
                    "write weights need: rename it; if it is in UTF-8, set PYTHONUTF8=1"
                )
            if item.name not in _FREE_TEXTS and re.match(r"~\w*/", part):
                meant = os.path.expanduser(part)
                raise ConfigError(
                    f"--{item.name} {part}: only a shell reads ~, and not behind = or in a file: "
                    f"write {meant}" + " with a user that exists" * (meant == part)
                )
            if item.name not in _FREE_TEXTS and (meant := _find_meant(part)):
                raise ConfigError(
                    f"--{item.name} {part}: a path of Windows, which is {meant} in WSL: write that"
                )


def _find_meant(path: str) -> str:
    """What a path of Windows is in WSL; "" if it is none, or may be used as it is."""
    if sys.platform == "win32" or os.path.lexists(path):
        return ""
    if found := _SHARE.fullmatch(path):
        return found[1].replace("\\", "/") or "/"
    if not (found := _DRIVE.fullmatch(path)):
        return ""
    is_whole = found[2].startswith(("\\", "/"))
    # without quotes a shell has taken the backslashes, and nobody knows where they were
    rest = found[2].replace("\\", "/") if is_whole else "/…"
    return f"/mnt/{found[1].lower()}{rest}"


def find_clash(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path]
) -> tuple[Path, Path] | None:
    """The first output that is there and is an input, by whatever path or link, and that input.

    A folder stands for all that it holds.
    """
    taken = {key: Path(output) for output in outputs for key, _ in _walk(Path(output))}
    if not taken:
        return None
    clashes = (
        (taken[key], path)
        for given in inputs
        if str(given)
        for key, path in _walk(Path(given))
        if key in taken
    )
    return next(clashes, None)


def _walk(path: Path) -> Iterator[tuple[_Identity, Path]]:
    """The identities of a file, or of a folder and all in it; none of what is missing."""
    with suppress(FileNotFoundError, NotADirectoryError):
        yield _identify(path), path
        for folder, folders, names in os.walk(path):
            for name in (*folders, *names):
                with suppress(FileNotFoundError):
                    yield _identify(Path(folder, name)), Path(folder, name)


def _identify(path: Path) -> _Identity:
    found = path.stat()
    return found.st_dev, found.st_ino


def _require_writable(folder: Path, named: str) -> None:
    """Raises ConfigError unless a folder is there and can be written, or can be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{named}: {folder} is no folder: choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{named}: the folder {folder} cannot be written: choose another")
