"""Compiled kernels kept on disk, in the user's cache folder."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rwkv_peft.errors import CheckpointError
from rwkv_peft.writing import atomic_write

DIGEST = hashlib.sha256().digest_size


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, kept under `key`; a file that is broken is made anew.

    Any number of processes and threads may call it at once. Where the folder cannot be
    written nothing is kept.
    """
    path = folder() / key
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept[DIGEST:]
    made = make()
    with contextlib.suppress(CheckpointError), atomic_write(path) as file:
        file.write(hashlib.sha256(made).digest() + made)
    return made


def folder() -> Path:
    """The cache folder, by the custom of the system."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rwkv-peft" / "kernels"
