"""A `.pth` as what it is: a zip file of a pickled table and a record for each storage.

`torch.load` maps such a file without looking at the length of a record or at its checksum, so that
a record that is too short gives the bytes behind it. Here both are known.
"""

import io
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch._weights_only_unpickler

from rwkv_peft.errors import CheckpointError, RwkvPeftError
from rwkv_peft.printing import escape
from rwkv_peft.recognise import TORCH, recognise

TABLE = "data.pkl"
# bytes that are read at once
CHUNK = 1 << 20
# bytes of the pickled table, of which a file of 13B takes 0.2 million
LONGEST_TABLE = 100_000_000
# of a local header, and where it tells the lengths of the name and of the field behind it
_HEADER, _LENGTHS = 30, 26


class Record(NamedTuple):
    """Where a record of a zip file lies, in bytes, and the CRC-32 of its content."""

    start: int
    size: int
    crc: int


@contextmanager
def damage_in_one_line(
    path: str | Path, what: str = "is damaged or no file of weights"
) -> Iterator[None]:
    """Makes one CheckpointError of whatever a library raises about a file of weights.

    No one knows what damage makes them raise: 343 files that were changed at random gave
    struct.error, IndexError, TypeError, AttributeError, AssertionError and more.
    """
    try:
        with warnings.catch_warnings():
            # of PyTorch, about kinds of tensors that are then refused
            warnings.simplefilter("ignore")
            yield
    except (RwkvPeftError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: {_explain(error)}") from error
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(
            f"{path} {what} ({first[:120]}): download or copy it again"
        ) from error


def find_records(path: str | Path) -> dict[str, Record]:
    """The records of a `.pth` by their names within its folder, such as 'data.pkl' and 'data/0'.

    Raises:
        CheckpointError: a record lies outside of the file, is compressed, or is there twice.
        Exception: of any kind, from the zip library, where the list of records is damaged.
    """
    found: dict[str, Record] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos, length = archive.infolist(), os.fstat(file.fileno()).st_size
        folder = min(i.filename for i in infos if i.filename.endswith(f"/{TABLE}"))[: -len(TABLE)]
        for info in infos:
            name = info.filename.removeprefix(folder)
            if name in found:
                raise CheckpointError(
                    f"{path} is damaged: it holds two records {escape(name[:80])}"
                )
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path} was packed again with compression, so that it cannot be mapped: write "
                    'it anew by python -c "import torch; '
                    "torch.save(torch.load('OLD.pth'), 'NEW.pth')\""
                )
            start = _find_start(file, info)
            if start is None or start + info.file_size > length:
                raise CheckpointError(f"{path} is damaged: it lacks the record {escape(name[:80])}")
            found[name] = Record(start, info.file_size, info.CRC)
    return found


def _find_start(file: IO[bytes], info: zipfile.ZipInfo) -> int | None:
    """Where the content of a record begins; None if there is none."""
    file.seek(info.header_offset)
    header = file.read(_HEADER)
    if header[:4] != b"PK\3\4" or info.compress_size != info.file_size:
        return None
    lengths = (header[i : i + 2] for i in (_LENGTHS, _LENGTHS + 2))
    return file.tell() + sum(int.from_bytes(length, "little") for length in lengths)


def map_pth(path: str | Path) -> Any:
    """What a `.pth` holds, its storages mapped from disk; writing to them does not change the file.

    No code of the file runs: PyTorch's reader of `weights_only=True` makes tensors of the table.
    Every storage is as long as its record.

    Raises:
        CheckpointError: see `find_records`; or a record has another length than its storage, or
            the table another checksum than its record.
        Exception: of any kind, where the table is damaged.
    """
    records = find_records(path)
    for name in (TABLE, "byteorder"):
        if name in records and (wrong := _find_wrong(path, name, records[name])):
            raise CheckpointError(f"{path} {wrong}: download or copy it again")
    if records[TABLE].size > LONGEST_TABLE:
        raise CheckpointError(f"{path} is damaged: its table has {records[TABLE].size:,} bytes")
    if "byteorder" in records and _read(path, records["byteorder"]) != b"little":
        raise CheckpointError(f"{path} has another byte order: save it again on this machine")
    content = torch.UntypedStorage.from_file(str(path), False, os.stat(path).st_size)

    def load_storage(found: Any) -> torch.storage.TypedStorage:
        _, kind, key, _, count = found
        # storages of the newest dtypes have none, and count bytes
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        name = f"data/{key}"
        record = records.get(name)
        if record is None or count * dtype.itemsize != record.size:
            has = f"{record.size:,} bytes" if record else "no bytes"
            raise CheckpointError(
                f"{path} is damaged: its record {escape(name[:80])} has {has}, "
                f"{count * dtype.itemsize:,} are needed; download or copy it again"
            )
        storage = content[record.start : record.start + record.size]
        # PyTorch computes with aligned numbers alone, which other zip programs do not care for
        storage = storage.clone() if record.start % dtype.itemsize else storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    # torch.load itself takes no storages from others; both names are those that it uses
    unpickler = torch._weights_only_unpickler.Unpickler(
        io.BytesIO(_read(path, records[TABLE])), encoding="utf-8"
    )
    unpickler.persistent_load = load_storage  # type: ignore[method-assign]
    return unpickler.load()


def read_record(path: str | Path, name: str) -> bytes:
    """The content of a record of a `.pth`; empty if it has none of this name, or another format.

    Raises:
        CheckpointError: see `find_records`; or the record is damaged.
    """
    if recognise(path) is not TORCH:
        return b""
    with damage_in_one_line(path):
        record = find_records(path).get(name)
    if record is None:
        return b""
    if wrong := _find_wrong(path, name, record):
        raise CheckpointError(f"{path} {wrong}: download or copy it again")
    return _read(path, record)


def require_sums(*paths: str | Path) -> None:
    """Raises CheckpointError unless each record of `.pth` files has the checksum noted for it.

    Folders, missing files, and formats that note none pass. It reads all of a file, at 1 to 3 GB a
    second for each core.
    """
    for path in map(Path, paths):
        if not path.is_file() or recognise(path) is not TORCH:
            continue
        with damage_in_one_line(path):
            records = find_records(path)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            wrong = pool.map(partial(_find_wrong, path), *zip(*records.items(), strict=True))
            if found := next(filter(None, wrong), ""):
                raise CheckpointError(
                    f"{path} {found}: download or copy it again; --check_files 0 leaves this out, "
                    "for files saved without checksums"
                )


def _explain(error: pickle.UnpicklingError) -> str:
    """Why torch does not unpickle a file, and what to do."""
    if found := re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", str(error), re.IGNORECASE):
        return (
            f"it holds more than tensors, and opening it would run code of {found[1]}. Who trusts "
            "it loads it where it was made, and saves model.state_dict() by torch.save"
        )
    return "its table of tensors is damaged; download or copy it again"


def _find_wrong(path: str | Path, name: str, record: Record) -> str:
    """What is wrong with the content of a record; empty if nothing is."""
    crc, left = 0, record.size
    with open(path, "rb") as file:
        file.seek(record.start)
        while left and (chunk := file.read(min(CHUNK, left))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return (
        f"is damaged: {escape(name[:80])} has another checksum" if left or crc != record.crc else ""
    )


def _read(path: str | Path, record: Record) -> bytes:
    with open(path, "rb") as file:
        file.seek(record.start)
        return file.read(record.size)
