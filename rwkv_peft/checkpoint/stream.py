"""Weight files written tensor by tensor, so that a model larger than memory can be written."""

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.writing import atomic_file

# where PyTorch puts a tensor's first byte, so that a mapped file gives aligned tensors
ALIGNMENT = 64
# a local header of the zip format, and the part of it that tells sizes above 4 GiB
_HEADER, _ZIP64 = 30, 20
# dtypes that both formats hold
_NAMES = {
    torch.float64: ("F64", "DoubleStorage"),
    torch.float32: ("F32", "FloatStorage"),
    torch.float16: ("F16", "HalfStorage"),
    torch.bfloat16: ("BF16", "BFloat16Storage"),
    torch.int64: ("I64", "LongStorage"),
    torch.int32: ("I32", "IntStorage"),
    torch.int16: ("I16", "ShortStorage"),
    torch.int8: ("I8", "CharStorage"),
    torch.uint8: ("U8", "ByteStorage"),
    torch.bool: ("BOOL", "BoolStorage"),
}
# the record of a `.pth` that holds what this program notes, which torch.load passes over
NOTE = "rwkv_peft.json"
# the formats of weight files, by the ends of their names
ENDINGS = (".pth", ".safetensors")
# the dtype that a command gives to the tensors it writes
StoredDtype = Literal["keep", "bf16", "fp16", "fp32"]


class Spec(NamedTuple):
    """What must be known of a tensor before it is made."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


def require_ending(path: str | Path, flag: str = "--output") -> None:
    """Raises ConfigError unless a name ends as that of a weight file does."""
    if Path(path).suffix not in ENDINGS:
        raise ConfigError(
            f"{flag} {path}: a file of weights is named .pth or .safetensors, by its format; "
            f"{Path(path).suffix or 'a name without an ending'} is neither"
        )


def write_tensors(
    path: str | Path,
    specs: Mapping[str, Spec],
    tensor: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    note: str = "",
) -> None:
    """Writes a `.pth` (or `.safetensors`, by its name) atomically, in the order of `specs`.

    Args:
        tensor: gives a tensor by its name, whole or as pieces along its first dimension. Each is
            written before the next is asked for, so that only one is in memory.
        note: a text beside the tensors, which who reads these does not see; see `records`.
    Raises:
        ConfigError: the name has another ending.
        CheckpointError: it cannot be written, and a file of that name stays as it was; or a type
            has no place in the format, or a number is not finite.
    """
    require_ending(path)
    _require_types(specs)
    with atomic_file(path) as file:
        is_safetensors = Path(path).suffix == ".safetensors"
        write_file(file, specs, tensor, is_safetensors=is_safetensors, note=note)


def write_file(
    file: IO[bytes],
    specs: Mapping[str, Spec],
    tensor: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    is_safetensors: bool,
    metadata: Mapping[str, str] | None = None,
    note: str = "",
) -> None:
    """Writes a `.pth` or safetensors into an open file; see `write_tensors`.

    Args:
        metadata: of a safetensors file.
        note: of a `.pth`.
    """

    def content(name: str) -> Iterator[memoryview]:
        return _iterate_bytes(name, specs[name], tensor(name))

    if is_safetensors:
        write_safetensors(file, specs, content, metadata)
    else:
        _write_pth(file, specs, content, note)


def _require_types(specs: Mapping[str, Spec]) -> None:
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise CheckpointError(f"{name} is {spec.dtype}, which weight files do not hold")


def require_finite(
    tensors: Mapping[str, Tensor], path: str | Path, stored: Mapping[str, Tensor] | None = None
) -> None:
    """Raises CheckpointError, with their names, if tensors of a file hold NaN or infinity.

    The tensors are read once where they are, and waited for once: as `is_finite`, 3 ms for 3 GB on
    an accelerator.

    Args:
        stored: the tensors as they are in the file, where `tensors` are of another dtype.
    """
    looked_at = {n: x for n, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not looked_at:
        return
    extremes = [torch.stack(x.detach().aminmax()).float() for x in looked_at.values()]
    flags = torch.stack(extremes).isfinite().all(dim=1).tolist()
    broken = [name for name, flag in zip(looked_at, flags, strict=True) if not flag]
    if not broken:
        return
    names = ", ".join(broken[:3]) + f" and {len(broken) - 3} more" * (len(broken) > 3)
    if stored is not None and all(is_finite(stored[name]) for name in broken):
        kind = str(looked_at[broken[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: {names}: values are too large for {kind}: use another --precision"
        )
    raise CheckpointError(
        f"{path}: NaN or infinity in {names}: download it again, or take an earlier file"
    )


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    NaN passes into both extremes. Unlike `isfinite` this reads the tensor once and makes no other:
    about a second for a gigabyte of bf16 on one core.
    """
    return not (x.is_floating_point() and x.numel()) or all(
        math.isfinite(extreme.item()) for extreme in x.detach().aminmax()
    )


def round_to(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A piece of a tensor in another dtype.

    Raises:
        CheckpointError: a value does not fit fp16, or is not finite.
    """
    result = x.to(dtype)
    if dtype == torch.float16 and not is_finite(result):
        if not is_finite(x):
            raise CheckpointError(f"{name} holds NaN or infinity: nothing was written")
        raise CheckpointError(
            f"{name} does not fit into fp16: give --dtype bf16 or fp32, or another format if this "
            "one holds neither"
        )
    return result


def _iterate_bytes(
    name: str, spec: Spec, content: Tensor | Iterable[Tensor]
) -> Iterator[memoryview]:
    """The bytes of a tensor, checked against `spec`: its shape only if it comes whole."""
    is_whole, count = isinstance(content, Tensor), 0
    for x in [content] if isinstance(content, Tensor) else content:
        if x.dtype != spec.dtype or (is_whole and x.shape != spec.shape):
            raise CheckpointError(f"{name} is {tuple(x.shape)} {x.dtype}, announced as {spec}")
        if not is_finite(x):
            raise CheckpointError(f"{name} holds NaN or infinity: nothing was written")
        count += x.numel()
        yield as_bytes(x)
    if count != spec.numel:
        raise CheckpointError(f"{name} has {count} elements, announced as {spec}")


def as_bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor; those of one on the host are not copied."""
    # flat, as a scalar cannot be viewed as bytes; as bytes, since numpy has no bf16
    data: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)


def write_safetensors(
    file: IO[bytes],
    specs: Mapping[str, Spec],
    content: Callable[[str], Iterable[memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the bytes of each tensor, in the order of `specs`, behind a header that names them.

    Raises:
        CheckpointError: a type has no place in the format.
    """
    _require_types(specs)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.numel * spec.dtype.itemsize
        kind = _NAMES[spec.dtype][0]
        header[name] = {"dtype": kind, "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in specs:
        file.writelines(content(name))


def map_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file, mapped from disk; writing to them does not change the file.

    They come as their data lies in the file: the library gives sorted names, whatever the order.
    """
    from safetensors import safe_open

    types = {kind: dtype for dtype, (kind, _) in _NAMES.items()}
    # the library checks the header; its tensors are copies, and these are views of the file
    with safe_open(path, framework="pt"):
        content = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    size = int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8 : 8 + size].numpy().tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name in sorted(header, key=lambda name: tuple(header[name]["data_offsets"])):
        start, end = header[name]["data_offsets"]
        data = content[8 + size + start : 8 + size + end]
        if header[name]["dtype"] not in types:
            raise CheckpointError(f"{path}: {name} is of the unknown type {header[name]['dtype']}")
        dtype = types[header[name]["dtype"]]
        # PyTorch views only aligned bytes as another dtype
        data = data.clone() if data.storage_offset() % dtype.itemsize else data
        found[name] = data.view(dtype).view(header[name]["shape"])
    return found


def _write_pth(
    file: IO[bytes],
    specs: Mapping[str, Spec],
    content: Callable[[str], Iterator[memoryview]],
    note: str,
) -> None:
    """The zip format of torch.save: the pickled table first, then a record for each storage."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, file, "archive/data.pkl", [_pickle_table(specs)])
        _write_record(archive, file, "archive/byteorder", [b"little"])
        for number, name in enumerate(specs):
            _write_record(archive, file, f"archive/data/{number}", content(name))
        _write_record(archive, file, "archive/version", [b"3\n"])
        if note:
            _write_record(archive, file, f"archive/{NOTE}", [note.encode()])


def _write_record(
    archive: zipfile.ZipFile,
    file: IO[bytes],
    name: str,
    content: Iterable[memoryview | bytes],
) -> None:
    info = zipfile.ZipInfo(name)
    start = file.tell() + _HEADER + len(name) + _ZIP64
    # an extra field of four bytes and as many more as bring the content to its place
    fill = -(start + 4) % ALIGNMENT
    info.extra = b"FB" + fill.to_bytes(2, "little") + b"Z" * fill
    with archive.open(info, "w", force_zip64=True) as record:
        record.writelines(content)


class _Storage(NamedTuple):
    key: str
    spec: Spec


class _Stub:
    """Pickles as the call by which torch.load makes a tensor of a storage.

    The private name of that call is part of the format. `torch.serialization.skip_data` would write
    the table too, but leaves wrong checksums in the zip, and its space must be filled through a
    memory map, where a full disk ends the process without an error.
    """

    def __init__(self, key: str, spec: Spec) -> None:
        self._storage = _Storage(key, spec)

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self._storage.spec.shape
        stride = torch.empty(shape, device="meta").stride()
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (self._storage, 0, shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(torch, _NAMES[obj.spec.dtype][1])
        return ("storage", kind, obj.key, "cpu", obj.spec.numel)


def _pickle_table(specs: Mapping[str, Spec]) -> bytes:
    buffer = io.BytesIO()
    table = {name: _Stub(str(i), spec) for i, (name, spec) in enumerate(specs.items())}
    _Pickler(buffer, protocol=2).dump(table)
    return buffer.getvalue()
