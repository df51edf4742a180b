"""Which tokens each row of a pass over the data holds, for each way to lay documents out."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rwkv_peft.data.documents import Documents
from rwkv_peft.data.packing import pack, pack_in_order

Indices = NDArray[np.int64]
# the random generator of a pass, by the number of the pass; None: the order of the file
MakeRng = Callable[[int], Generator] | None


class Rows(NamedTuple):
    """Rows, each made of one or more slices of the token array.

    A slice of n positions begins at token `first` and reads n + 1 tokens: each position has the
    token behind it as its target, so that the last token is a target alone.

    Attributes:
        begins: (rows + 1,) index of each row's first slice, and the number of slices.
        document: (slices,) index of the document that each slice is of.
        first: (slices,) index of its first token.
        length: (slices,) its positions.
    """

    begins: Indices
    document: Indices
    first: Indices
    length: Indices

    @property
    def sizes(self) -> Indices:
        """(rows,) positions used in each row."""
        return np.add.reduceat(self.length, self.begins[:-1])

    def take(self, rows: Indices) -> "Rows":
        """The rows of these indices, (rows taken,), in this order."""
        counts = np.diff(self.begins)[rows]
        ends = np.cumsum(counts)
        slices = np.arange(counts.sum()) + np.repeat(self.begins[rows] - ends + counts, counts)
        columns = (self.document[slices], self.first[slices], self.length[slices])
        return Rows(np.concatenate([[0], ends]), *columns)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one after the other."""
    begins = [np.array([0]), *(np.diff(part.begins) for part in parts)]
    names = ("document", "first", "length")
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    return Rows(np.cumsum(np.concatenate(begins)), *columns)


class Layout(NamedTuple):
    """The rows of every pass.

    Attributes:
        num_rows: rows of a pass, the same in each.
        draw_rows: gives the rows of a pass by its number, in the order in which they are trained.
    """

    num_rows: int
    draw_rows: Callable[[int], Rows]


def cut_documents(documents: Documents, chosen: Indices, ctx_len: int) -> Rows:
    """One row for each chosen document, several for one with more targets than `ctx_len`.

    Each row is one slice, and each token but a document's first is a target exactly once. A slice
    without a token to train, because all are masked, is left out: it could teach nothing.

    Args:
        chosen: (documents chosen,) indices.
    """
    num_targets = np.diff(documents.starts)[chosen] - 1
    num_slices = -(-num_targets // ctx_len)
    document = np.repeat(chosen, num_slices)
    # each slice's number within its document
    number = np.arange(len(document)) - np.repeat(np.cumsum(num_slices) - num_slices, num_slices)
    first = documents.starts[document] + number * ctx_len
    length = np.minimum(documents.starts[document + 1] - 1 - first, ctx_len)
    rows = Rows(np.arange(len(document) + 1), document, first, length)
    if documents.weights is None:
        return rows
    ends = np.stack((first + 1, first + 1 + length), 1).flatten()
    is_trained = np.append(documents.weights != 0, False)
    num_trained = np.add.reduceat(is_trained, ends, dtype=np.int64)[::2]
    return rows.take(np.flatnonzero(num_trained))


def pad_rows(slices: Rows, make_rng: MakeRng) -> Layout:
    """The layout of one slice a row, to be padded."""
    num_rows = len(slices.begins) - 1

    def draw_rows(number: int) -> Rows:
        return slices if make_rng is None else slices.take(make_rng(number).permutation(num_rows))

    return Layout(num_rows, lru_cache(maxsize=2)(draw_rows))


def pack_rows(slices: Rows, ctx_len: int, make_rng: MakeRng) -> Layout:
    """The layout of sequence packing: slices end to end in rows of `ctx_len`.

    Which lengths share a row is chosen once. A generator deals the slices of each length out anew
    in every pass, so that a slice has other neighbours.
    """
    packing = (pack if make_rng else pack_in_order)(slices.length, ctx_len)
    num_rows = len(packing.begins) - 1
    slots = np.argsort(packing.lengths, kind="stable")

    def draw_rows(number: int) -> Rows:
        if make_rng is None:
            return slices._replace(begins=packing.begins)
        rng = make_rng(number)
        order = rng.permutation(len(slots))
        dealt = np.empty_like(slots)
        dealt[slots] = order[np.argsort(slices.length[order], kind="stable")]
        columns = (slices.document[dealt], slices.first[dealt], slices.length[dealt])
        return Rows(packing.begins, *columns).take(rng.permutation(num_rows))

    return Layout(num_rows, lru_cache(maxsize=2)(draw_rows))


def cut_windows(documents: Documents, chosen: Indices, ctx_len: int, make_rng: MakeRng) -> Layout:
    """The layout of windows of `ctx_len`, cut from the chosen documents end to end.

    The documents are read as a ring, so that every token is read once wherever the first window
    begins; a generator draws another beginning for every pass.

    Args:
        chosen: (documents chosen,) indices, rising.
    """
    # where documents follow one another their tokens do: such a run begins at `run_starts` in the
    # tokens, and at `run_places` in the ring
    is_first = np.diff(chosen, prepend=-2) > 1
    places = np.cumsum(np.append(0, np.diff(documents.starts)[chosen]))
    run_starts, run_places = documents.starts[chosen[is_first]], places[:-1][is_first]
    size = int(places[-1])
    num_rows = -(-size // ctx_len)

    def draw_rows(number: int) -> Rows:
        rng = make_rng(number) if make_rng else None
        offset = int(rng.integers(size)) if rng else 0
        cuts = np.append(np.arange(num_rows) * ctx_len, size) + offset
        # a window that reaches the end of a run goes on at the beginning of the next, and behind
        # the last at that of the first, as another slice
        borders = np.concatenate([run_places, run_places + size])
        edges = np.union1d(cuts, borders[(borders > cuts[0]) & (borders < cuts[-1])])
        place, length = edges[:-1] % size, np.diff(edges)
        run = np.searchsorted(run_places, place, side="right") - 1
        first = run_starts[run] + place - run_places[run]
        document = np.searchsorted(documents.starts, first, side="right") - 1
        begins = np.searchsorted(edges, cuts)
        rows = Rows(begins, document, first, length)
        return rows.take(rng.permutation(num_rows)) if rng else rows

    return Layout(num_rows, lru_cache(maxsize=2)(draw_rows))
