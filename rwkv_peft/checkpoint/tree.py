"""A tree of tensors and plain values as a folder: safetensors, JSON, and a manifest of hashes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from rwkv_peft import __version__
from rwkv_peft.checkpoint.records import damage_in_one_line
from rwkv_peft.checkpoint.stream import Spec, as_bytes, map_safetensors, write_safetensors
from rwkv_peft.errors import CheckpointError

# of this layout of files; a program refuses what is newer than it
FORMAT = 1
MANIFEST, VALUES, TENSORS = "manifest.json", "run.json", "tensors.safetensors"
FILES = (MANIFEST, VALUES, TENSORS)
# stands in the JSON where a tensor does, with its name in the other file
_TENSOR = "$tensor"
_BLOCK = 1 << 22


def write_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Writes a tree into a folder, which the caller gives its name when all is on the disk.

    Args:
        tree: dictionaries with texts as keys, lists, tensors on the host, numbers, texts, None.
            Tuples come back as lists.
    """
    tensors: dict[str, Tensor] = {}
    values = _take_out(tree, (), tensors)
    specs = {name: Spec(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    with open(folder / TENSORS, "wb") as file:
        hashing = _Hashing(file)
        write_safetensors(hashing, specs, lambda name: [as_bytes(tensors[name])])  # type: ignore[arg-type]
    text = json.dumps(values, indent=1).encode()
    (folder / VALUES).write_bytes(text)
    files = {
        VALUES: {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        TENSORS: {"size": hashing.size, "sha256": hashing.sha256.hexdigest()},
    }
    manifest = {"format": FORMAT, "program": f"rwkv-peft {__version__}", "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_tree(folder: Path) -> dict[str, Any]:
    """The tree in a folder in which `find_damage` found none; its tensors are mapped from disk.

    Raises:
        CheckpointError: its hashes are right, and its content is no tree.
    """
    with damage_in_one_line(folder):
        tensors = map_safetensors(folder / TENSORS)
        tree: dict[str, Any] = _put_back(read_values(folder), tensors)
        return tree


def read_values(folder: Path) -> dict[str, Any]:
    """The tree without its tensors, in whose places their names stand."""
    values: dict[str, Any] = json.loads((folder / VALUES).read_bytes())
    return values


def find_damage(folder: Path) -> str:
    """Why a folder cannot be read as it was written, for a person; empty if it can.

    Raises:
        CheckpointError: a newer version of the program wrote it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
        wanted = {
            name: (int(files[name]["size"]), str(files[name]["sha256"]))
            for name in (VALUES, TENSORS)
        }
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to its end"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return f"{MANIFEST} is damaged"
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return f"{MANIFEST} is damaged"
    if version != FORMAT:
        program = str(manifest.get("program", "another version"))[:80]
        raise CheckpointError(
            f"{folder} has format {str(version)[:20]}, of {program}; "
            f"rwkv-peft {__version__} reads {FORMAT}: use the version that wrote it"
        )
    for name, (size, digest) in wanted.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes and was written with {size:,}"
            if _hash_file(folder / name) != digest:
                return f"{name} is not what was written: its hash differs"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def _take_out(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """The value in plain JSON, its tensors moved to `tensors` under names made of their paths."""
    if isinstance(value, Tensor):
        name = "/".join(path)
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _take_out(x, (*path, key), tensors) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(x, (*path, str(i)), tensors) for i, x in enumerate(value)]
    return value


def _put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_back(x, tensors) for key, x in value.items()}
    return [_put_back(x, tensors) for x in value] if isinstance(value, list) else value


def _hash_file(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def writelines(self, lines: Iterable[memoryview]) -> None:
        for line in lines:
            self.write(line)
