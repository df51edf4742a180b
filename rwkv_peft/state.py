"""The recurrent state of a model: all that it carries from one run of tokens to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """One layer's part of a state; None in place of it means all zeros.

    Attributes:
        att_shift, ffn_shift: (B, D), the last normed input of each mixer.
        wkv: (B, H, N, N) float32, rows = value, columns = key.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor


class RWKVState(NamedTuple):
    """State of a whole model.

    Attributes:
        att_shift, ffn_shift: (L, B, D), the last normed input of each mixer.
        wkv: (L, B, H, N, N) float32, rows = value, columns = key, as in `time_state` files.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor

    @classmethod
    def from_layers(cls, layers: list[LayerState]) -> RWKVState:
        """The state of a model from those of all its layers."""
        return cls(*map(torch.stack, zip(*layers, strict=True)))

    def layers(self) -> list[LayerState]:
        """The states of the layers, as views; their gradients are stacked once."""
        return [LayerState(*part) for part in zip(*(x.unbind() for x in self), strict=True)]

    def detach(self) -> RWKVState:
        """The same values without their autograd graph."""
        return RWKVState(*(x.detach() for x in self))

    def expand(self, batch: int) -> RWKVState:
        """A state of one row, repeated for `batch` rows without a copy."""
        return RWKVState(*(x.expand(-1, batch, *x.shape[2:]) for x in self))

    def restart(self, rows: Tensor) -> RWKVState:
        """The state with zeros in the rows (B,) bool in which a document begins anew."""
        return RWKVState(*(x.masked_fill(rows.view(-1, *[1] * (x.ndim - 2)), 0) for x in self))

    def select(self, rows: Tensor) -> RWKVState:
        """A copy of some rows of the batch, by their indices (B',)."""
        return RWKVState(*(x[:, rows] for x in self))
