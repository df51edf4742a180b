"""The recurrent state of a model: all it carries from one stretch of tokens to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer's part of a state; None in place of it means all zeros.

    Attributes:
        att_shift, ffn_shift: (B, D), the last normed input of each mixer.
        wkv: (B, H, N, N) float32, rows = value, columns = key.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor


@dataclass(frozen=True, slots=True)
class RWKVState:
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
        return cls(
            torch.stack([layer.att_shift for layer in layers]),
            torch.stack([layer.ffn_shift for layer in layers]),
            torch.stack([layer.wkv for layer in layers]),
        )

    def layers(self) -> list[LayerState]:
        """The parts of the layers, as views whose gradients are gathered once."""
        parts = zip(
            self.att_shift.unbind(), self.ffn_shift.unbind(), self.wkv.unbind(), strict=True
        )
        return [LayerState(*part) for part in parts]

    def detach(self) -> RWKVState:
        """The same values, cut from the graph that made them."""
        return RWKVState(self.att_shift.detach(), self.ffn_shift.detach(), self.wkv.detach())

    def expand(self, batch: int) -> RWKVState:
        """A state of one row, repeated for `batch` rows without a copy."""
        return RWKVState(
            self.att_shift.expand(-1, batch, -1),
            self.ffn_shift.expand(-1, batch, -1),
            self.wkv.expand(-1, batch, -1, -1, -1),
        )

    def select(self, rows: Tensor) -> RWKVState:
        """The rows of a batch named by an index tensor (B',), copied."""
        return RWKVState(self.att_shift[:, rows], self.ffn_shift[:, rows], self.wkv[:, rows])
