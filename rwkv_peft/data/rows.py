"""What the rows of one pass over the data are made of, for each way to lay documents out."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.documents import Documents
from rwkv_peft.data.packing import pack, pack_in_order

Indices = NDArray[np.int64]


class Rows(NamedTuple):
    """Rows as runs of slices of the token array; each position of a row has one target.

    A slice of n positions begins at token `first` and reads n + 1 tokens: the last is a target
    alone.

    Attributes:
        begins: (rows + 1,) the first slice of each row, and the end.
        document: (slices,) of which document each is.
        first: (slices,) its first token.
        length: (slices,) its positions.
    """

    begins: Indices
    document: Indices
    first: Indices
    length: Indices

    @property
    def sizes(self) -> Indices:
        """Positions used in each row."""
        return np.add.reduceat(self.length, self.begins[:-1])

    def take(self, rows: Indices) -> "Rows":
        """The rows named by their indices, in that order."""
        counts = np.diff(self.begins)[rows]
        ends = np.cumsum(counts)
        slices = np.arange(counts.sum()) + np.repeat(self.begins[rows] - ends + counts, counts)
        slots = (self.document[slices], self.first[slices], self.length[slices])
        return Rows(np.concatenate([[0], ends]), *slots)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one after the other."""
    begins = [np.array([0]), *(np.diff(part.begins) for part in parts)]
    columns = ("document", "first", "length")
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in columns)
    return Rows(np.cumsum(np.concatenate(begins)), *joined)


class Layout(NamedTuple):
    """A way to lay documents out.

    Attributes:
        num_rows: rows of a pass, the same in each.
        rows: the rows of a pass, by its number, in the order in which they are trained.
    """

    num_rows: int
    rows: Callable[[int], Rows]


def pieces_of(documents: Documents, chosen: Indices, ctx_len: int) -> Rows:
    """A row for each document, or several for one with more targets than `ctx_len`.

    Each token but a document's first is a target exactly once. A piece of a document that has no
    token to train, because all are masked, is left out: it could teach nothing.
    """
    num_targets = np.diff(documents.starts)[chosen] - 1
    num_pieces = -(-num_targets // ctx_len)
    document = np.repeat(chosen, num_pieces)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    first = documents.starts[document] + piece * ctx_len
    length = np.minimum(documents.starts[document + 1] - 1 - first, ctx_len)
    rows = Rows(np.arange(len(document) + 1), document, first, length)
    if documents.weights is None:
        return rows
    ends = np.stack((first + 1, first + 1 + length), 1).flatten()
    is_trained = np.append(documents.weights != 0, False)
    trained = np.add.reduceat(is_trained, ends, dtype=np.int64)[::2]
    return rows.take(np.flatnonzero(trained))


def padded(pieces: Rows, rng: Callable[[int], np.random.Generator] | None) -> Layout:
    """One piece a row; drawn anew for each pass if there is an `rng`."""
    num_rows = len(pieces.begins) - 1

    def rows(number: int) -> Rows:
        return pieces if rng is None else pieces.take(rng(number).permutation(num_rows))

    return Layout(num_rows, lru_cache(maxsize=2)(rows))


def packed(pieces: Rows, ctx_len: int, rng: Callable[[int], np.random.Generator] | None) -> Layout:
    """Pieces laid end to end in rows of `ctx_len`.

    The lengths that share a row are chosen once; with an `rng` each pass deals the pieces of a
    length out anew, so that neighbours change.
    """
    packing = (pack if rng else pack_in_order)(pieces.length, ctx_len)
    num_rows = len(packing.begins) - 1
    slots = np.argsort(packing.lengths, kind="stable")

    def rows(number: int) -> Rows:
        if rng is None:
            return pieces._replace(begins=packing.begins)
        generator = rng(number)
        order = generator.permutation(len(slots))
        dealt = np.empty_like(slots)
        dealt[slots] = order[np.argsort(pieces.length[order], kind="stable")]
        columns = (pieces.document[dealt], pieces.first[dealt], pieces.length[dealt])
        return Rows(packing.begins, *columns).take(generator.permutation(num_rows))

    return Layout(num_rows, lru_cache(maxsize=2)(rows))


def streamed(
    documents: Documents,
    chosen: Indices,
    ctx_len: int,
    rng: Callable[[int], np.random.Generator] | None,
) -> Layout:
    """Windows of `ctx_len` over the documents laid end to end, wherever those begin.

    The stream is a ring, so that every token is read once whatever the offset of the first
    window; with an `rng` each pass draws another.
    """
    start, end = int(documents.starts[chosen[0]]), int(documents.starts[chosen[-1] + 1])
    size = end - start
    num_rows = -(-size // ctx_len)

    def rows(number: int) -> Rows:
        generator = rng(number) if rng else None
        offset = int(generator.integers(size)) if generator else 0
        cuts = np.append(np.arange(num_rows) * ctx_len, size) + offset
        # the window over the end of the stream goes on at its beginning
        edges = np.union1d(cuts, size)
        first, length = start + edges[:-1] % size, np.diff(edges)
        document = np.searchsorted(documents.starts, first, side="right") - 1
        begins = np.searchsorted(edges, cuts)
        rows = Rows(begins, document, first, length)
        return rows.take(generator.permutation(num_rows)) if generator else rows

    return Layout(num_rows, lru_cache(maxsize=2)(rows))
