"""Tensors where they lie: mapped from a file, still to be merged, or quantised."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_peft.methods.merge import split_rows


class Stored(NamedTuple):
    """A tensor of which a few rows at a time are made.

    Attributes:
        shape: of the whole.
        dtype: of its pieces.
        pieces: gives it as pieces along its first dimension, in order.
        tensor: the whole, where it needs no memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]
    tensor: Tensor | None = None

    def whole(self) -> Tensor:
        """All of it; without a copy if it is mapped."""
        return self.tensor if self.tensor is not None else torch.cat(list(self.pieces()))

    def floats(self) -> Iterator[Tensor]:
        """The pieces in float32."""
        return (x.float() for x in self.pieces())


def mapped(x: Tensor) -> Stored:
    """A tensor that is there, in memory or mapped from a file."""
    return Stored(tuple(x.shape), x.dtype, lambda: split_rows(x), x)


def all_mapped(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors that are there, by name."""
    return {name: mapped(x) for name, x in tensors.items()}
