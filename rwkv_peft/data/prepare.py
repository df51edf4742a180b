"""From a file of texts to token arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.records import Record, read_jsonl
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokenised documents, each with the end-of-document token 0 behind it.

    Attributes:
        path: the file they come from.
        tokens: all tokens end to end.
        starts: (documents + 1,) where each begins in `tokens`; the last entry is the end.
        lines: (documents,) line of each in the file.
        num_bytes: UTF-8 bytes of all texts.
        num_empty: rows left out because their text is empty.
    """

    path: str
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    num_bytes: int
    num_empty: int

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def num_trained(self) -> int:
        """Tokens with a loss: all but the first of each document."""
        return len(self.tokens) - len(self)

    @property
    def longest(self) -> int:
        """Most trained tokens in one document."""
        return int(np.diff(self.starts).max()) - 1


def read_documents(path: str | Path, tokenizer: Tokenizer) -> Documents:
    """All documents of a jsonl file, tokenised.

    Raises:
        DataError: a line is broken, or the file holds nothing that could be trained.
    """
    return encode_documents(read_jsonl(path), tokenizer, str(path))


def encode_documents(records: Iterable[Record], tokenizer: Tokenizer, path: str) -> Documents:
    """Tokenises records; `path` is for messages."""
    pieces, lines, num_bytes, num_empty = [], [], 0, 0
    for record in records:
        if not record.text:
            num_empty += 1
            continue
        try:
            tokens = tokenizer.encode(record.text)
        except DataError as error:
            raise DataError(f"{path}:{record.line}: {error}") from error
        pieces.append(np.array([*tokens, tokenizer.eod], dtype=np.int32))
        lines.append(record.line)
        num_bytes += len(record.text.encode())
    if not pieces:
        what = f"all {num_empty} rows have an empty text" if num_empty else "the file is empty"
        raise DataError(f'{path}: no trainable token: {what}; give lines like {{"text": "..."}}')
    return Documents(
        path=path,
        tokens=np.concatenate(pieces),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        num_bytes=num_bytes,
        num_empty=num_empty,
    )
