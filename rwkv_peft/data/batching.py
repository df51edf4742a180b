"""From documents to batches: the only place that shifts targets by one and marks what to ignore."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_peft.data.prepare import Documents

IGNORE = -100  # target of a position without a loss


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        tokens: (B, T) int64, padded with 0 on the right.
        targets: (B, T) int64, the token after each; IGNORE where there is none to train.
        lines: line of each row's document in its file.
    """

    tokens: Tensor
    targets: Tensor
    lines: list[int]

    @property
    def num_trained(self) -> int:
        """Positions with a loss."""
        return int((self.targets != IGNORE).sum())


class PaddedBatches:
    """Micro-batches of one document a row, padded to the longest row of each.

    A document longer than `ctx_len` becomes several rows, so that every token but the first is a
    target exactly once in a pass over the data. The place in the data is one integer, the number of
    micro-batches before; the order of a pass depends on nothing but the seed and its number.
    """

    def __init__(
        self, documents: Documents, *, ctx_len: int, micro_bsz: int, seed: int, is_shuffled: bool
    ) -> None:
        self.documents, self.micro_bsz = documents, micro_bsz
        self.seed, self.is_shuffled = seed, is_shuffled
        num_targets = np.diff(documents.starts) - 1
        num_pieces = -(-num_targets // ctx_len)
        self._document = np.repeat(np.arange(len(documents)), num_pieces)
        piece = np.arange(num_pieces.sum()) - np.repeat(
            np.cumsum(num_pieces) - num_pieces, num_pieces
        )
        self._first = documents.starts[self._document] + piece * ctx_len
        self._length = np.minimum(num_targets[self._document] - piece * ctx_len, ctx_len)
        self._order = lru_cache(maxsize=2)(self._order_of_pass)

    def __len__(self) -> int:
        """Micro-batches in one pass."""
        return -(-self.num_rows // self.micro_bsz)

    @property
    def num_rows(self) -> int:
        """Rows in one pass: documents, the long ones counted once a piece."""
        return len(self._first)

    def __getitem__(self, position: int) -> Batch:
        """The micro-batch after `position` others, over any number of passes."""
        number, index = divmod(position, len(self))
        rows = self._order(number)[index * self.micro_bsz : (index + 1) * self.micro_bsz]
        first, length = self._first[rows], self._length[rows]
        tokens = np.zeros((len(rows), length.max()), dtype=np.int64)
        targets = np.full_like(tokens, IGNORE)
        for i, (start, n) in enumerate(zip(first, length, strict=True)):
            tokens[i, :n] = self.documents.tokens[start : start + n]
            targets[i, :n] = self.documents.tokens[start + 1 : start + n + 1]
            if self.documents.weights is not None:
                targets[i, :n][self.documents.weights[start + 1 : start + n + 1] == 0] = IGNORE
        lines = self.documents.lines[self._document[rows]].tolist()
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), lines)

    def _order_of_pass(self, number: int) -> NDArray[np.int64]:
        if not self.is_shuffled:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, number]).permutation(self.num_rows)
