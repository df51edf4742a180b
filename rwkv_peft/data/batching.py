"""From documents to batches: the only place that shifts targets and sets the ignore index."""

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
    cut_documents,
    cut_windows,
    pack_rows,
    pad_rows,
)
from rwkv_peft.errors import DataError

IGNORE = -100  # the ignore index: target of a position without a loss
# optimizer steps whose rows are sorted by length together
BUCKET_STEPS = 32

Dataload = Literal["pack", "pad", "only", "get"]


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        tokens: (B, T) int64 token ids, padded with 0 on the right.
        targets: (B, T) int64, the token after each; IGNORE where nothing is trained.
        lines: line in its file of each document in the rows, row by row.
        weights: (B, T) float32, the loss weight of each target; None: all 1.
        segment_ids: (B, T) int32, the number within its row of each position's packed document;
            None: the rows are not packed.
        states: (B,) the name of the state that each row's first document trains; None: no names.
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
        """Positions that have a target."""
        return int((self.targets != IGNORE).sum())

    @property
    def weight(self) -> float:
        """Sum of the loss weights of all targets, by which a step's loss is divided."""
        return float(self.num_trained if self.weights is None else self.weights.sum())

    def without_targets(self) -> "Batch":
        """One of the same shape that trains nothing and is not counted."""
        targets = torch.full_like(self.targets, IGNORE)
        weights = None if self.weights is None else torch.zeros_like(self.weights)
        return self._replace(targets=targets, weights=weights, lines=[], num_tokens=0)

    def lengthened(self, width: int) -> "Batch":
        """One with rows of at least so many positions, by padding that trains nothing."""
        rows, own = self.tokens.shape
        if (more := width - own) <= 0:
            return self
        weights, ids = self.weights, self.segment_ids
        return self._replace(
            tokens=torch.cat((self.tokens, self.tokens.new_zeros(rows, more)), 1),
            targets=torch.cat((self.targets, self.targets.new_full((rows, more), IGNORE)), 1),
            weights=None
            if weights is None
            else torch.cat((weights, weights.new_zeros(rows, more)), 1),
            # the padding goes on with the last document
            segment_ids=None if ids is None else torch.cat((ids, ids[:, -1:].expand(-1, more)), 1),
        )


class Batches:
    """All micro-batches of a run: `batches[position]` is the one after `position` others.

    A pass takes every row once, and the next pass draws another order. The order depends on the
    seed and the number of the pass alone, so that a run can be resumed at any position, and is the
    same however many ranks take the micro-batches of a step (see `share`).

    Args:
        dataload: how documents become rows. 'pack' (sequence packing) lays them end to end in rows
            of `ctx_len`, and the state restarts at each; 'pad' lays one document in a row, and
            rows of similar lengths in a batch; 'only' is 'pad' with one row, and so without
            padding; 'get' cuts windows of `ctx_len` from all documents end to end, and the state
            runs on from document to document.
        ctx_len: most positions of a row.
        micro_bsz: rows of a micro-batch.
        accumulate: micro-batches of an optimizer step, those of all ranks; 'pad' gives it rows of
            similar lengths.
        keeps_width: a static batch has `micro_bsz` rows also where there are not as many.
    Raises:
        DataError: no row has a token to train.
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
        keeps_width: bool = False,
    ) -> None:
        self.documents, self.dataload, self.ctx_len = documents, dataload, ctx_len
        self.seed, self.is_shuffled = seed, is_shuffled
        self.layouts = []
        for number, (name, chosen) in enumerate(documents.groups):
            layout = self._lay_out(number, chosen) if len(chosen) else None
            if layout is None or not layout.num_rows:
                part = "" if documents.shares is None else " in this part of the mixture"
                raise DataError(f"{name}: no trainable token{part}")
            self.layouts.append(layout)
        self.rows_of_pass = _count_rows(self.layouts, documents.shares)
        self.num_rows = sum(self.rows_of_pass)
        # a batch is never wider than the data
        is_kept = keeps_width and self.is_static
        self.micro_bsz = micro_bsz if is_kept else min(micro_bsz, self.num_rows)
        self._rows_of_step = micro_bsz * accumulate
        self.draw_rows = lru_cache(maxsize=2)(self._draw_rows)

    def _lay_out(self, group: int, chosen: Indices) -> Layout:
        def make_rng(number: int) -> Generator:
            return default_rng([self.seed, number, group])

        make = make_rng if self.is_shuffled else None
        if self.dataload == "get":
            return cut_windows(self.documents, chosen, self.ctx_len, make)
        slices = cut_documents(self.documents, chosen, self.ctx_len)
        if self.dataload == "pack":
            return pack_rows(slices, self.ctx_len, make)
        return pad_rows(slices, make)

    @property
    def is_static(self) -> bool:
        """Whether all batches have one shape, (micro_bsz, ctx_len)."""
        return self.dataload in ("pack", "get")

    @property
    def positions(self) -> int:
        """Positions of a micro-batch; the most, where they differ."""
        return self.micro_bsz * self.ctx_len

    def __len__(self) -> int:
        """Micro-batches of one pass."""
        return -(-self.num_rows // self.micro_bsz)

    def _draw_rows(self, number: int) -> Rows:
        """The rows of the pass of this number, in the order in which they are trained."""
        parts = []
        for layout, count in zip(self.layouts, self.rows_of_pass, strict=True):
            # the rows of each file go on where the last pass left them, over passes of their own
            position, end = number * count, (number + 1) * count
            while position < end:
                own, first = divmod(position, layout.num_rows)
                taken = min(layout.num_rows - first, end - position)
                parts.append(layout.draw_rows(own).take(np.arange(first, first + taken)))
                position += taken
        rows = concatenate(parts)
        rng = default_rng([self.seed, number, len(self.layouts)])
        if len(parts) > 1:
            even = [(np.arange(n) + 0.5) / n for n in self.rows_of_pass]
            order = np.argsort(np.concatenate(even), kind="stable")
            rows = rows.take(rng.permutation(self.num_rows) if self.is_shuffled else order)
        if self.dataload == "pad" and self.is_shuffled:
            rows = rows.take(_sort_steps(rows.sizes, self._rows_of_step, rng))
        return rows

    def __getitem__(self, position: int) -> Batch:
        """The micro-batch after `position` others, over any number of passes."""
        number, index = divmod(position, len(self))
        first = index * self.micro_bsz
        rows = np.arange(first, min(first + self.micro_bsz, self.num_rows))
        return self._make_batch(self.draw_rows(number).take(rows))

    def _make_batch(self, rows: Rows) -> Batch:
        documents, num_rows = self.documents, len(rows.begins) - 1
        shape = (max(1, num_rows), int(rows.sizes.max()) if num_rows else 1)
        if self.is_static:
            shape = (self.micro_bsz, self.ctx_len)
        tokens = np.zeros(shape, dtype=np.int64)
        targets = np.zeros(shape, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        segment_ids = np.zeros(shape, dtype=np.int32)
        for row in range(num_rows):
            at = 0
            for number, i in enumerate(range(rows.begins[row], rows.begins[row + 1])):
                first, length = rows.first[i], rows.length[i]
                place = (row, slice(at, at + length))
                tokens[place] = documents.tokens[first : first + length]
                self._set_targets(targets[place], weights[place], first + 1)
                at += length
                # the padding behind has the number of the last document
                segment_ids[row, at - length :] = number
        targets[weights == 0] = IGNORE
        is_plain = documents.weights is None or not ((weights != 0) & (weights != 1)).any()
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            documents.lines[rows.document].tolist(),
            weights=None if is_plain else torch.from_numpy(weights),
            segment_ids=torch.from_numpy(segment_ids) if self.dataload == "pack" else None,
            states=None if documents.states is None else self._name_states(rows, shape[0]),
            num_tokens=int(rows.length.sum()),
        )

    def _set_targets(self, targets: np.ndarray, weights: np.ndarray, first: int) -> None:
        """Fills in the tokens from `first` on as targets, and their loss weights."""
        documents = self.documents
        end = min(first + len(targets), len(documents.tokens))
        targets[: end - first] = documents.tokens[first:end]
        weights[: end - first] = 1 if documents.weights is None else documents.weights[first:end]
        if self.dataload == "get":
            # nothing before a document's first token foretells it
            low, high = np.searchsorted(documents.starts, [first, end])
            weights[documents.starts[low:high] - first] = 0

    def _name_states(self, rows: Rows, num_rows: int) -> list[str]:
        assert self.documents.states is not None
        names: list[str] = self.documents.states[rows.document[rows.begins[:-1]]].tolist()
        # a row without a target trains no state: any name will do
        return names + [str(self.documents.states[0])] * (num_rows - len(names))

    def share_of_tokens(self) -> float:
        """Share of the positions of the first pass that hold tokens; the others are padding."""
        sizes = self.draw_rows(0).sizes
        if self.is_static:
            positions = len(self) * self.micro_bsz * self.ctx_len
        else:
            begins = np.arange(0, self.num_rows, self.micro_bsz)
            counts = np.diff(np.append(begins, self.num_rows))
            positions = int((np.maximum.reduceat(sizes, begins) * counts).sum())
        return float(sizes.sum() / positions)


class Turn(NamedTuple):
    """What a rank takes: the micro-batch at a position, without its targets if not counted."""

    position: int
    is_counted: bool = True


def share(window: range, rank: int = 0, size: int = 1) -> list[Turn]:
    """What one of several ranks takes of the positions of an optimizer step.

    Every rank takes as many, so that all work together throughout: the last ones may be of a
    position that another has, and do not count.
    """
    count = -(-len(window) // size)
    numbers = range(rank, count * size, size)
    return [Turn(window[min(i, len(window) - 1)], i < len(window)) for i in numbers]


def load(batches: Batches, turns: Iterable[Turn], num_workers: int = 0) -> Iterator[Batch]:
    """The batches of `turns` in their order, made ahead by `num_workers` threads.

    Threads are enough: to make a batch is to copy arrays, and numpy releases the interpreter's lock
    for that.
    """

    def make(turn: Turn) -> Batch:
        batch = batches[turn.position]
        return batch if turn.is_counted else batch.without_targets()

    if not num_workers:
        yield from map(make, turns)
        return
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for turn in turns:
            waiting.append(pool.submit(make, turn))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _count_rows(layouts: list[Layout], shares: tuple[float, ...] | None) -> list[int]:
    """Rows of each file in a pass: all, or by its share until the first file is used up."""
    if shares is None:
        return [layout.num_rows for layout in layouts]
    # of the largest, so that no share however small or large leaves the range of floats
    parts = [share / max(shares) for share in shares]
    total = min(layout.num_rows / part for layout, part in zip(layouts, parts, strict=True) if part)
    return [max(1, round(total * part)) for part in parts]


def _sort_steps(sizes: Indices, rows_of_step: int, rng: Generator) -> Indices:
    """An order, (rows,), in which each step has rows of similar sizes; the steps are shuffled."""
    whole = len(sizes) // rows_of_step * rows_of_step
    parts = []
    for start in range(0, whole, BUCKET_STEPS * rows_of_step):
        end = min(start + BUCKET_STEPS * rows_of_step, whole)
        steps = (start + np.argsort(sizes[start:end], kind="stable")).reshape(-1, rows_of_step)
        parts.append(rng.permutation(steps).flatten())
    return np.concatenate([*parts, np.arange(whole, len(sizes))])
