"""Writing files as if the power could fail."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rwkv_peft.errors import CheckpointError


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file object whose content becomes `path` at the end, or not at all.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; `path` is as it was.
    """
    path = Path(path)
    # machines that share a folder may count their processes and threads alike
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the previous file is untouched" if path.exists() else ""
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}{kept}. Free space or choose another "
            "folder"
        ) from error
