"""Compiled kernels kept on disk, in the user's cache folder."""

import contextlib
import hashlib
from collections.abc import Callable

from rwkv_peft.errors import CheckpointError
from rwkv_peft.writing import atomic_file, cache_folder

DIGEST = hashlib.sha256().digest_size


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, kept under `key`; a file that is broken is made anew.

    Any number of processes and threads may call it at once. Where the folder cannot be
    written nothing is kept.
    """
    path = cache_folder("kernels") / key
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept[DIGEST:]
    made = make()
    with contextlib.suppress(CheckpointError), atomic_file(path) as file:
        file.write(hashlib.sha256(made).digest() + made)
    return made
