"""From a file of texts to token arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.config import DataConfig
from rwkv_peft.data.records import Record, read_jsonl
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError


@dataclass(frozen=True, slots=True)
class Report:
    """What was read and what was left out; lines are those of the row's own file.

    Attributes:
        num_rows: rows met, good or bad.
        num_bytes: UTF-8 bytes of all texts.
        empty: rows left out because they have no text.
        bad: rows left out because they cannot be read, as messages with file:line.
        duplicates: rows that repeat an earlier one; they are kept.
        untrained: rows left out because the mask leaves none of their tokens.
    """

    num_rows: int = 0
    num_bytes: int = 0
    empty: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokenised documents; whatever is made from text has the end-of-document token 0 behind it.

    Attributes:
        paths: the files they come from.
        tokens: all tokens end to end, of any integer type; may be a memory map.
        starts: (documents + 1,) int64, where each begins in `tokens`; the last entry is the end.
        lines: (documents,) int64, line or row of each in its file, from 1.
        sources: (documents,) uint8, index of each one's file in `paths`.
        shares: parts of the files in a weighted mixture, in their order; None: all as they are.
        weights: (tokens,) float32 or uint8, the weight of each token as a target, 0 if masked;
            None: all 1. A document's first token is no target whatever stands here.
        states: (documents,) names of the state that each trains, "" for none; None: no names.
        report: what was read and what was left out.
    """

    paths: tuple[str, ...]
    tokens: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    sources: NDArray[np.uint8]
    shares: tuple[float, ...] | None = None
    weights: NDArray[np.float32] | NDArray[np.uint8] | None = None
    states: NDArray[np.str_] | None = None
    report: Report = Report()

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def num_targets(self) -> int:
        """Tokens that follow another of their document, masked or not."""
        return len(self.tokens) - len(self)

    @property
    def num_trained(self) -> int:
        """Targets whose weight is not 0."""
        if self.weights is None:
            return self.num_targets
        first = np.count_nonzero(self.weights[self.starts[:-1]])
        return int(np.count_nonzero(self.weights) - first)

    @property
    def longest(self) -> int:
        """Most targets in one document."""
        return int(np.diff(self.starts).max()) - 1

    def where(self, document: int) -> str:
        """File and line of a document."""
        return f"{self.paths[self.sources[document]]}:{self.lines[document]}"


def read_documents(config: DataConfig, tokenizer: Tokenizer) -> Documents:
    """All documents that `config` names, tokenised.

    Raises:
        DataError: a row is broken, or there is nothing that could be trained.
    """
    return encode_documents(read_jsonl(config.data_file), tokenizer, config.data_file)


def encode_documents(records: Iterable[Record], tokenizer: Tokenizer, path: str) -> Documents:
    """Tokenises records; `path` is for messages."""
    pieces, lines, num_rows, num_bytes, empty = [], [], 0, 0, []
    for record in records:
        num_rows += 1
        if not record.text:
            empty.append(f"{path}:{record.line}")
            continue
        try:
            tokens = tokenizer.encode(record.text)
        except DataError as error:
            raise DataError(f"{path}:{record.line}: {error}") from error
        pieces.append(np.array([*tokens, tokenizer.eod], dtype=np.int32))
        lines.append(record.line)
        num_bytes += len(record.text.encode())
    if not pieces:
        what = f"all {num_rows} rows have an empty text" if num_rows else "the file is empty"
        raise DataError(f'{path}: no trainable token: {what}; give lines like {{"text": "..."}}')
    return Documents(
        paths=(path,),
        tokens=np.concatenate(pieces),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        sources=np.zeros(len(lines), dtype=np.uint8),
        report=Report(num_rows=num_rows, num_bytes=num_bytes, empty=tuple(empty)),
    )
