"""The recurrent state of a model: all it carries from one stretch of tokens to the next."""

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
        """Stacks the states of all layers."""
        return cls(*map(torch.stack, zip(*layers, strict=True)))

    def layers(self) -> list[LayerState]:
        """The parts of the layers, as views whose gradients are gathered once."""
        return [LayerState(*part) for part in zip(*(x.unbind() for x in self), strict=True)]

    def detach(self) -> RWKVState:
        """The same values, cut from the graph that made them."""
        return RWKVState(*(x.detach() for x in self))

    def expand(self, batch: int) -> RWKVState:
        """A state of one row, repeated for `batch` rows without a copy."""
        return RWKVState(*(x.expand(-1, batch, *x.shape[2:]) for x in self))

    def select(self, rows: Tensor) -> RWKVState:
        """The rows of a batch named by an index tensor (B',), copied."""
        return RWKVState(*(x[:, rows] for x in self))
