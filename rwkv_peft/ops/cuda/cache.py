"""Compiled kernels kept on disk, in the user's cache folder."""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

DIGEST = hashlib.sha256().digest_size


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, kept under `key`; a file that is broken is made anew.

    Any number of processes may call it at once. Where the folder cannot be written nothing is kept.
    """
    path = folder() / key
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept[DIGEST:]
    made = make()
    with contextlib.suppress(OSError):
        _write(path, hashlib.sha256(made).digest() + made)
    return made


def folder() -> Path:
    """The cache folder, by the custom of the system."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rwkv-peft" / "kernels"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
