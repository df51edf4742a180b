"""Tokenised documents, and the report of what was read and what was left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.remarks import REMARKS


@dataclass(frozen=True, slots=True)
class Places:
    """Where rows stand in their files.

    Attributes:
        table: (rows, 2) int64, the index of each row's file, and its line there.
    """

    table: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.table)

    def describe(self, paths: Sequence[str], limit: int | None = None) -> list[str]:
        """The first `limit` of them, or all, as file:line."""
        return [f"{paths[source]}:{line}" for source, line in self.table[:limit].tolist()]


@dataclass(frozen=True, slots=True)
class Report:
    """What was read and what was left out.

    Attributes:
        num_rows: rows met, good or bad.
        num_bytes: UTF-8 bytes of all texts; 0 if they were read as tokens.
        forms: documents of each form, such as messages.
        bad: rows left out because they cannot be read, as messages with file:line.
        empty: rows left out because they have no text.
        untrained: rows left out because the mask leaves none of their tokens.
        duplicates: rows that repeat an earlier one; they are kept.
        remarks: rows that are kept and call for a remark, by its name in `remarks`.
        num_endless: of the first documents of a token file, those without token 0 at their end.
        notes: what else to know of the files, a line each.
    """

    num_rows: int = 0
    num_bytes: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    empty: Places = Places()
    untrained: Places = Places()
    duplicates: Places = Places()
    remarks: dict[str, Places] = field(default_factory=dict)
    num_endless: int = 0
    notes: tuple[str, ...] = ()

    def describe(self, paths: Sequence[str], limit: int = 5) -> Iterator[str]:
        """Lines for a person about all that may be wrong, each with the first `limit` places."""
        yield from (f"data: {note}" for note in self.notes)
        kinds = {
            "without a text, left out": self.empty,
            "in which the mask leaves nothing, left out": self.untrained,
            "that repeat an earlier one, kept": self.duplicates,
            **{REMARKS[name]: places for name, places in self.remarks.items()},
        }
        for what, places in kinds.items():
            if places:
                shown = ", ".join(places.describe(paths, limit))
                more = ", ..." if len(places) > limit else ""
                yield f"data: {len(places):,} rows {what}: {shown}{more}"
        if self.bad:
            yield f"data: {len(self.bad):,} rows that cannot be read, left out:"
            yield from (f"  {bad}" for bad in self.bad)
        if self.num_endless:
            yield (
                f"data: {self.num_endless:,} of the first documents do not end with token 0, so "
                "that the model is not taught to stop: prepare them with --append_eod 1"
            )


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokenised documents, each with the end-of-document token 0 behind it if made from text.

    Attributes:
        paths: the files they come from.
        tokens: (tokens,) all tokens end to end, of any integer dtype; may be a memory map.
        starts: (documents + 1,) int64, where each begins in `tokens`; the last entry is the end.
        lines: (documents,) int64, line or row of each in its file, from 1.
        sources: (documents,) int32, index of each one's file in `paths`.
        entries: name and number of files of each entry of --data_file, a file or a folder; they
            follow one another in `paths`; (): each file is an entry.
        shares: share of each entry in a mixture; None: every file as a whole.
        weights: (tokens,) float32 or uint8, the loss weight of each token as a target, 0 if it is
            masked; None: all 1. A document's first token is never a target, whatever its weight.
        states: (documents,) name of the state that each trains, "" for none; None: no names.
        chosen: indices of the documents that are used, rising, which alone are counted; None: all.
        report: what was read and what was left out.
    """

    paths: tuple[str, ...]
    tokens: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    sources: NDArray[np.integer[Any]]
    entries: tuple[tuple[str, int], ...] = ()
    shares: tuple[float, ...] | None = None
    weights: NDArray[np.float32] | NDArray[np.uint8] | None = None
    states: NDArray[np.str_] | None = None
    chosen: NDArray[np.int64] | None = None
    report: Report = Report()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def indices(self) -> NDArray[np.int64]:
        """The documents that are used."""
        return np.arange(len(self.lines)) if self.chosen is None else self.chosen

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each document that is used."""
        sizes = np.diff(self.starts)
        return sizes if self.chosen is None else sizes[self.chosen]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents that are used."""
        return int(self.sizes.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that follow another token of their document, masked or not."""
        return self.num_tokens - len(self)

    @property
    def names(self) -> set[str]:
        """Names of the states that the documents train; empty if they name none."""
        return set() if self.states is None else set(self.states[self.indices].tolist())

    @property
    def num_trained(self) -> int:
        """Targets whose loss weight is not 0."""
        if self.weights is None:
            return self.num_targets
        is_trained, starts = self.weights != 0, self.starts[:-1]
        counts = np.add.reduceat(is_trained, starts, dtype=np.int64) - is_trained[starts]
        return int(counts[self.indices].sum())

    @property
    def longest(self) -> int:
        """Most targets in one document."""
        return int(self.sizes.max()) - 1

    @property
    def groups(self) -> list[tuple[str, NDArray[np.int64]]]:
        """Name and documents of each part of a mixture; without shares all documents are one."""
        entries = self.entries or tuple((path, 1) for path in self.paths)
        if self.shares is None:
            return [(", ".join(name for name, _ in entries), self.indices)]
        found, start = [], 0
        sources = self.sources[self.indices]
        for name, count in entries:
            is_in = (sources >= start) & (sources < start + count)
            found.append((name, self.indices[is_in]))
            start += count
        return found

    def where(self, document: int) -> str:
        """File and line of a document."""
        return f"{self.paths[self.sources[document]]}:{self.lines[document]}"


def first_documents(documents: Documents, count: int) -> Documents:
    """The first `count` documents, or all if there are fewer."""
    return replace(documents, chosen=documents.indices[:count])
