"""From documents to batches: the only place that shifts targets by one and marks what to ignore."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import Tensor

from rwkv_peft.data.documents import Documents
from rwkv_peft.data.rows import (
    Indices,
    Layout,
    Rows,
    concatenate,
    packed,
    padded,
    pieces_of,
    streamed,
)
from rwkv_peft.errors import DataError

IGNORE = -100  # target of a position without a loss
# steps of rows that are sorted by length together, so that a batch holds rows of like lengths
BUCKET_STEPS = 32

Dataload = Literal["pack", "pad", "only", "get"]


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        tokens: (B, T) int64, padded with 0 on the right.
        targets: (B, T) int64, the token after each; IGNORE where there is none to train.
        lines: lines of the documents in their files, row by row.
        weights: (B, T) float32, how much each target counts; None: all 1.
        segment_ids: (B, T) int32, numbers the documents packed into a row; None: one a row.
        states: for each row the name of the state that its first document trains; None: no names.
        num_tokens: positions that hold a token of a document, trained or not.
    """

    tokens: Tensor
    targets: Tensor
    lines: list[int]
    weights: Tensor | None = None
    segment_ids: Tensor | None = None
    states: list[str] | None = None
    num_tokens: int = 0

    @property
    def num_trained(self) -> int:
        """Positions with a loss."""
        return int((self.targets != IGNORE).sum())

    @property
    def weight(self) -> float:
        """Sum of the weights of all targets: what a step's loss is divided by."""
        return float(self.num_trained if self.weights is None else self.weights.sum())


class Batches:
    """All micro-batches of a run, by one integer: how many others come before.

    A pass takes every row once; the next draws a new order. The order depends on the seed and the
    number of the pass alone, so that a run can be taken up at any position. The ranks share the
    rows of each position; those of the last one of a pass may be too few for all, then the rest
    get rows without a target. Where rows are packed every batch has the same shape.

    Args:
        dataload: how documents become rows. 'pack' lays them end to end in rows of `ctx_len`, the
            state restarts at each; 'pad' lays one in a row, rows of like lengths together; 'only'
            is 'pad' with one row, and so no padding; 'get' cuts windows of `ctx_len` from all
            documents end to end, wherever they begin, and the state runs on over their borders.
        accumulate: positions of an optimizer step, whose rows 'pad' chooses to be of like lengths.
        rank, world_size: which share of each position's rows this process takes.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        dataload: Dataload,
        ctx_len: int,
        micro_bsz: int,
        seed: int,
        is_shuffled: bool,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.documents, self.dataload, self.ctx_len = documents, dataload, ctx_len
        self.seed, self.is_shuffled = seed, is_shuffled
        self.rank, self.world_size = rank, world_size
        groups = [np.arange(len(documents))]
        if documents.shares is not None:
            groups = [np.flatnonzero(documents.sources == i) for i in range(len(documents.shares))]
        self.layouts = [self._layout(i, chosen) for i, chosen in enumerate(groups)]
        self.rows_of_pass = _rows_of_pass(self.layouts, documents.shares)
        self.num_rows = sum(self.rows_of_pass)
        if not self.num_rows:
            raise DataError(f"{', '.join(documents.paths)}: no trainable token")
        # a batch is never wider than the data
        self.micro_bsz = min(micro_bsz, -(-self.num_rows // world_size))
        self._rows_of_step = micro_bsz * accumulate * world_size
        self.rows = lru_cache(maxsize=2)(self._rows)

    def _layout(self, group: int, chosen: Indices) -> Layout:
        def rng(number: int) -> Generator:
            return default_rng([self.seed, number, group])

        drawn = rng if self.is_shuffled else None
        if self.dataload == "get":
            return streamed(self.documents, chosen, self.ctx_len, drawn)
        pieces = pieces_of(self.documents, chosen, self.ctx_len)
        if self.dataload == "pack":
            return packed(pieces, self.ctx_len, drawn)
        return padded(pieces, drawn)

    @property
    def is_static(self) -> bool:
        """Whether all batches have one shape, (micro_bsz, ctx_len)."""
        return self.dataload in ("pack", "get")

    def __len__(self) -> int:
        """Micro-batches of each rank in one pass."""
        return -(-self.num_rows // (self.micro_bsz * self.world_size))

    def _rows(self, number: int) -> Rows:
        """The rows of a pass, in the order in which they are trained."""
        parts = []
        for layout, count in zip(self.layouts, self.rows_of_pass, strict=True):
            # each file goes on where the last pass left it, over passes of its own
            position, end = number * count, (number + 1) * count
            while position < end:
                own, first = divmod(position, layout.num_rows)
                taken = min(layout.num_rows - first, end - position)
                parts.append(layout.rows(own).take(np.arange(first, first + taken)))
                position += taken
        rows = concatenate(parts)
        rng = default_rng([self.seed, number, len(self.layouts)])
        if len(parts) > 1:
            even = [(np.arange(n) + 0.5) / n for n in self.rows_of_pass]
            order = np.argsort(np.concatenate(even), kind="stable")
            rows = rows.take(rng.permutation(self.num_rows) if self.is_shuffled else order)
        if self.dataload == "pad" and self.is_shuffled:
            rows = rows.take(_bucketed(rows.sizes, self._rows_of_step, rng))
        return rows

    def __getitem__(self, position: int) -> Batch:
        """The micro-batch after `position` others, over any number of passes."""
        number, index = divmod(position, len(self))
        size = self.micro_bsz * self.world_size
        block = np.arange(index * size, min((index + 1) * size, self.num_rows))
        return self._batch(self.rows(number).take(block[self.rank :: self.world_size]))

    def _batch(self, rows: Rows) -> Batch:
        documents, num_rows = self.documents, len(rows.begins) - 1
        shape = (max(1, num_rows), int(rows.sizes.max()) if num_rows else 1)
        if self.is_static:
            shape = (self.micro_bsz, self.ctx_len)
        tokens = np.zeros(shape, dtype=np.int64)
        targets = np.zeros(shape, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        segments = np.zeros(shape, dtype=np.int32)
        for row in range(num_rows):
            at = 0
            for number, i in enumerate(range(rows.begins[row], rows.begins[row + 1])):
                first, length = rows.first[i], rows.length[i]
                place = (row, slice(at, at + length))
                tokens[place] = documents.tokens[first : first + length]
                self._set_targets(targets[place], weights[place], first + 1)
                at += length
                # padding counts to the last document
                segments[row, at - length :] = number
        targets[weights == 0] = IGNORE
        is_plain = documents.weights is None or not ((weights != 0) & (weights != 1)).any()
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            documents.lines[rows.document].tolist(),
            weights=None if is_plain else torch.from_numpy(weights),
            segment_ids=torch.from_numpy(segments) if self.dataload == "pack" else None,
            states=None if documents.states is None else self._states(rows, shape[0]),
            num_tokens=int(rows.length.sum()),
        )

    def _set_targets(self, targets: np.ndarray, weights: np.ndarray, first: int) -> None:
        """Fills in the tokens from `first` on as targets, and their weights."""
        documents = self.documents
        end = min(first + len(targets), len(documents.tokens))
        targets[: end - first] = documents.tokens[first:end]
        weights[: end - first] = 1 if documents.weights is None else documents.weights[first:end]
        if self.dataload == "get":
            # a document's first token follows from nothing
            low, high = np.searchsorted(documents.starts, [first, end])
            weights[documents.starts[low:high] - first] = 0

    def _states(self, rows: Rows, num_rows: int) -> list[str]:
        assert self.documents.states is not None
        names: list[str] = self.documents.states[rows.document[rows.begins[:-1]]].tolist()
        # a row without a target may begin with any
        return names + [str(self.documents.states[0])] * (num_rows - len(names))

    def share_of_tokens(self) -> float:
        """Part of all positions of the first pass that hold tokens, the rest being padding."""
        sizes = self.rows(0).sizes
        if self.is_static:
            positions = len(self) * self.micro_bsz * self.world_size * self.ctx_len
        else:
            begins = np.arange(0, self.num_rows, self.micro_bsz)
            counts = np.diff(np.append(begins, self.num_rows))
            positions = int((np.maximum.reduceat(sizes, begins) * counts).sum())
        return float(sizes.sum() / positions)


def load(batches: Batches, positions: Iterable[int], num_workers: int = 0) -> Iterator[Batch]:
    """The batches of `positions` in order, prepared ahead by so many threads.

    Threads do: making a batch is copying, from a disk at worst, for which numpy lets go of the
    interpreter.
    """
    if not num_workers:
        yield from map(batches.__getitem__, positions)
        return
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for position in positions:
            waiting.append(pool.submit(batches.__getitem__, position))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _rows_of_pass(layouts: list[Layout], shares: tuple[float, ...] | None) -> list[int]:
    """Rows of each file in a pass: all of them, or shares; the pass ends with the first file."""
    if shares is None:
        return [layout.num_rows for layout in layouts]
    total = min(layout.num_rows / share for layout, share in zip(layouts, shares, strict=True))
    return [max(1, round(total * share)) for share in shares]


def _bucketed(sizes: Indices, rows_of_step: int, rng: Generator) -> Indices:
    """An order in which the rows of a step are of like sizes and the steps come in any order."""
    whole = len(sizes) // rows_of_step * rows_of_step
    parts = []
    for start in range(0, whole, BUCKET_STEPS * rows_of_step):
        end = min(start + BUCKET_STEPS * rows_of_step, whole)
        steps = (start + np.argsort(sizes[start:end], kind="stable")).reshape(-1, rows_of_step)
        parts.append(rng.permutation(steps).flatten())
    return np.concatenate([*parts, np.arange(whole, len(sizes))])
