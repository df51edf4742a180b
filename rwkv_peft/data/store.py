"""Arrays that grow as data is read, in memory or in a folder that later runs open again."""

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.encode import Chunk
from rwkv_peft.data.remarks import REMARKS
from rwkv_peft.errors import DataError

_REMARKS = list(REMARKS)
# elements of an array that are looked at, or loss weights that are written, at a time
BLOCK = 1 << 20
# arrays beside the tokens, whose dtype is an argument, and the loss weights (see _add_weights)
_COLUMNS = {
    "sizes": np.int32,
    "lines": np.int64,
    "sources": np.int32,
    "digests": np.uint64,
    "states": np.int32,
    # (rows, 2): source and line of each row that was left out
    "empty": np.int64,
    "untrained": np.int64,
    # (remarks, 3): number of the remark, source and line of each row that calls for it
    "remarks": np.int64,
}


class Store:
    """Collects chunks; `arrays` and `finish` give what was collected.

    Array names: those of _COLUMNS, `tokens`, and `mask` or `weights` if a loss weight is not 1.

    Args:
        folder: where the arrays grow as files; None keeps them in memory.
    """

    def __init__(self, dtype: np.dtype[Any], folder: Path | None = None) -> None:
        self._folder = folder
        self._dtypes = {"tokens": dtype, **{k: np.dtype(t) for k, t in _COLUMNS.items()}}
        self._files: dict[str, BinaryIO] = {name: self._open(name) for name in self._dtypes}
        self._names: dict[str, int] = {"": 0}
        self._checksums: dict[str, int] = {}
        self.num_tokens = 0
        self.facts: dict[str, Any] = {"num_rows": 0, "num_bytes": 0, "forms": {}, "bad": []}

    def add(self, chunk: Chunk, source: int, path: str) -> None:
        """Takes a chunk in; `source` is the index of the file `path` that it comes from."""
        self._add_weights(chunk)
        self._write("tokens", chunk.tokens)
        self.num_tokens += len(chunk.tokens)
        for name in ("sizes", "lines", "digests"):
            self._write(name, np.array(getattr(chunk, name), dtype=self._dtypes[name]))
        self._write("sources", np.full(len(chunk.sizes), source))
        numbers = [self._names.setdefault(name, len(self._names)) for name in chunk.states]
        self._write("states", np.array(numbers, dtype=np.int32))
        for name in ("empty", "untrained"):
            lines = np.array(getattr(chunk, name), dtype=np.int64)
            self._write(name, np.stack([np.full_like(lines, source), lines], axis=1))
        for name, places in chunk.remarks.items():
            number = _REMARKS.index(name)
            self._write("remarks", np.array([(number, source, line) for line in places]))
        self.facts["num_rows"] += chunk.num_rows
        self.facts["num_bytes"] += chunk.num_bytes
        self.facts["bad"] += [f"{path}:{line}: {reason}" for line, reason in chunk.bad]
        for form in chunk.forms:
            self.facts["forms"][form] = self.facts["forms"].get(form, 0) + 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name."""
        if self._folder is None:
            found = {}
            for name, file in self._files.items():
                assert isinstance(file, io.BytesIO)
                found[name] = np.frombuffer(file.getbuffer(), dtype=self._dtypes[name])
            return found
        self.close()
        return _map_all(self._folder, self._dtypes)

    def finish(self) -> dict[str, Any]:
        """The facts; with a folder they are written there, which makes it complete."""
        self.facts["states"] = list(self._names)
        self.facts["dtypes"] = {name: str(dtype) for name, dtype in self._dtypes.items()}
        self.facts["checksums"] = {name: self._checksums.get(name, 0) for name in self._dtypes}
        if self._folder is not None:
            self.close()
            text = json.dumps({**self.facts, "checksum": _checksum_of(self.facts)})
            (self._folder / "facts.json").write_text(text, encoding="utf-8")
        return self.facts

    def close(self) -> None:
        """Closes the files of the folder, which keep what was written."""
        if self._folder is not None:
            for file in self._files.values():
                file.close()

    def _open(self, name: str) -> BinaryIO:
        if self._folder is None:
            return io.BytesIO()
        return open(self._folder / name, "w+b")

    def _write(self, name: str, values: NDArray[Any]) -> None:
        if len(values):
            content = values.astype(self._dtypes[name], copy=False).tobytes()
            self._files[name].write(content)
            if self._folder is not None:
                self._checksums[name] = zlib.crc32(content, self._checksums.get(name, 0))

    def _add_weights(self, chunk: Chunk) -> None:
        """Loss weights are kept from the first that is not 1, as a mask while all are 0 or 1."""
        weights = chunk.weights
        if weights is not None and "weights" not in self._files:
            if not ((weights == 0) | (weights == 1)).all():
                self._start_weights("weights", np.float32)
            elif "mask" not in self._files:
                self._start_weights("mask", np.uint8)
        for name in self._files.keys() & {"mask", "weights"}:
            self._write(name, np.ones(len(chunk.tokens)) if weights is None else weights)

    def _start_weights(self, name: str, dtype: type[np.generic]) -> None:
        """Opens a column of weights for all tokens so far: those of the mask, otherwise 1."""
        self._dtypes[name], self._files[name] = np.dtype(dtype), self._open(name)
        mask = self._files.pop("mask") if name == "weights" and "mask" in self._files else None
        if mask is not None:
            mask.seek(0)
        for start in range(0, self.num_tokens, BLOCK):
            count = min(BLOCK, self.num_tokens - start)
            part = np.ones(count) if mask is None else np.frombuffer(mask.read(count), np.uint8)
            self._write(name, part)
        if mask is not None:
            mask.close()
            del self._dtypes["mask"]
            self._checksums.pop("mask", None)
            if self._folder is not None:
                (self._folder / "mask").unlink()


def open_store(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays, as memory maps, and the facts of a complete folder, all as they were written.

    The checksums take a second for a gigabyte. The texts that the data was made of are larger, and
    were hashed before to find the folder.

    Raises:
        DataError: the folder was damaged since it was written.
    """
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if facts.pop("checksum") != _checksum_of(facts):
            raise ValueError("facts.json is not as it was written")
        dtypes = {name: np.dtype(dtype) for name, dtype in facts["dtypes"].items()}
        arrays = _map_all(folder, dtypes)
        for name, array in arrays.items():
            if _checksum_of_array(array) != facts["checksums"][name]:
                raise ValueError(f"{name} is not as it was written")
        return arrays, facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"the prepared data in {folder} is damaged: delete it ({error})") from error


def _checksum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _checksum_of_array(array: NDArray[Any]) -> int:
    checksum = 0
    for start in range(0, len(array), BLOCK):
        checksum = zlib.crc32(array[start : start + BLOCK].tobytes(), checksum)
    return checksum


def _map_all(folder: Path, dtypes: dict[str, np.dtype[Any]]) -> dict[str, NDArray[Any]]:
    return {
        name: np.memmap(folder / name, dtype=dtype, mode="r")
        if (folder / name).stat().st_size
        else np.zeros(0, dtype=dtype)
        for name, dtype in dtypes.items()
    }
