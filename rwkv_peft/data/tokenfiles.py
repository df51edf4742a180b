"""Files of token ids, opened as memory maps: binidx pairs, .npy arrays, raw uint16."""

import hashlib
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.sources import Source
from rwkv_peft.errors import DataError

Tokens = NDArray[np.integer[Any]]

# Megatron's format, as json2binidx and make_data.py write it
MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
# what this program puts behind an index, where no reader looks: the mark of the tokens' file
_SIGN, _DIGEST = b"RWKVPEFT", 16
# parts of a file that its mark is made of, evenly spread, and their bytes
NUM_PARTS, PART = 64, 4096
# tokens looked at in one go
BLOCK = 1 << 24


class TokenFile(NamedTuple):
    """Tokens end to end, and where each document starts, (documents + 1,)."""

    tokens: Tokens
    starts: NDArray[np.int64]


def open_tokens(source: Source, vocab_size: int) -> TokenFile:
    """The tokens of a file, not copied; empty documents are left out.

    Raises:
        DataError: the file is not of its kind, or an id is outside the vocabulary.
    """
    try:
        found = _OPENERS[source.kind](source.path)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source.path}: not a {source.kind} file: {error}") from error
    check_ids(found.tokens, vocab_size, source.path)
    return found


def check_ids(tokens: Tokens, vocab_size: int, path: str) -> None:
    """Raises DataError unless every id is in the vocabulary."""
    info = np.iinfo(tokens.dtype)
    if info.min >= 0 and info.max < vocab_size:
        return
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"{path}: token id {low if low < 0 else high} is outside the vocabulary of "
                f"{vocab_size}: was it made with another tokenizer?"
            )


def _open_binidx(path: str) -> TokenFile:
    raw = np.fromfile(f"{path}.idx", dtype=np.uint8)
    if len(raw) < _HEADER.size or raw[:9].tobytes() != MAGIC:
        raise DataError(f"{path}.idx: not the index of a binidx pair")
    _, version, code, count, num_marks = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}.idx: version {version} with dtype code {code} cannot be read: tokens must "
            "be whole numbers, version 1"
        )
    end = _HEADER.size + 12 * count + 8 * num_marks
    mark = raw[end:].tobytes()
    if len(raw) < end or mark[: len(_SIGN)] not in (b"", _SIGN):
        raise DataError(f"{path}.idx: {len(raw)} bytes do not hold {count} documents; was it cut?")
    body = raw[_HEADER.size : end]
    sizes = body[: 4 * count].view("<i4").astype(np.int64)
    places = body[4 * count : 12 * count].copy().view("<i8")
    dtype = np.dtype(_DTYPES[code])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if (sizes < 0).any() or (places != starts[:-1] * dtype.itemsize).any():
        raise DataError(f"{path}.idx: its documents do not follow one another in {path}.bin")
    tokens = _map(f"{path}.bin", dtype)
    if len(tokens) != starts[-1]:
        raise DataError(
            f"{path}.bin has {len(tokens)} tokens, but {path}.idx names {starts[-1]}: one of them "
            "was cut, or they are of different data; prepare the data again"
        )
    if mark and mark != mark_tokens(f"{path}.bin"):
        raise DataError(
            f"{path}.bin and {path}.idx are of different data: copy both again, or prepare the "
            "data again"
        )
    return TokenFile(tokens, np.unique(starts))


def mark_tokens(path: str | Path) -> bytes:
    """What an index says of its file of tokens, so that it is not taken for that of another.

    It is made of 64 parts of the file, since a file may have many gigabytes and need not be read
    whole before training: another file has other tokens in them, while a damaged one may not.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        for i in range(NUM_PARTS):
            file.seek(max(0, size - PART) * i // (NUM_PARTS - 1))
            digest.update(file.read(PART))
    return _SIGN + digest.digest()[:_DIGEST]


def _open_numpy(path: str) -> TokenFile:
    with warnings.catch_warnings():
        # numpy warns of headers that Python 2 wrote, and reads them
        warnings.simplefilter("ignore", UserWarning)
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
        except (SyntaxError, TokenError) as error:  # numpy parses the header as Python
            raise DataError(f"{path}: not a numpy file: its header cannot be read") from error
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2):
        raise DataError(
            f"{path}: {tokens.dtype} of shape {tokens.shape}: tokens must be whole numbers, one "
            "row or one row a document"
        )
    if tokens.ndim == 2:
        # rows without a column are no documents
        starts = np.unique(np.arange(len(tokens) + 1) * tokens.shape[1])
        return TokenFile(tokens.reshape(-1), starts)
    return TokenFile(tokens, _find_starts(tokens))


def _open_uint16(path: str) -> TokenFile:
    tokens = _map(path, np.dtype("<u2"))
    return TokenFile(tokens, _find_starts(tokens))


_OPENERS = {"binidx": _open_binidx, "numpy": _open_numpy, "uint16": _open_uint16}


def _map(path: str, dtype: np.dtype[Any]) -> Tokens:
    size = Path(path).stat().st_size
    if size % dtype.itemsize:
        raise DataError(f"{path}: {size} bytes do not hold a whole number of {dtype} tokens")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)


def _find_starts(tokens: Tokens) -> NDArray[np.int64]:
    """Starts of documents that each end with token 0."""
    ends = [
        start + 1 + np.flatnonzero(tokens[start : start + BLOCK] == 0)
        for start in range(0, len(tokens), BLOCK)
    ]
    return np.unique(np.concatenate([[0], *ends, [len(tokens)]])).astype(np.int64)


def write_index(file: IO[bytes], sizes: NDArray[np.int64], dtype: np.dtype[Any]) -> None:
    """Writes the .idx of a pair whose documents have `sizes` tokens of `dtype`.

    Args:
        sizes: (documents,) tokens of each.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else sizes
    file.write(_HEADER.pack(MAGIC, 1, _CODES[dtype], len(sizes), len(sizes) + 1))
    file.write(sizes.astype("<i4").tobytes())
    file.write((starts * dtype.itemsize).astype("<i8").tobytes())
    file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())


def cut_blocks(file: TokenFile, num_tokens: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Ranges of whole documents, [first, last), of about `num_tokens` each."""
    first, count = 0, len(file.starts) - 1
    while first < count:
        limit = file.starts[first] + num_tokens
        last = int(np.searchsorted(file.starts, limit, side="right")) - 1
        last = min(count, max(first + 1, last))
        yield first, last
        first = last
