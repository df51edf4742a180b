"""Layers that several versions share. B batch, T time, D width."""

import torch
from torch import Tensor, nn

from rwkv_peft.models.geometry import Geometry
from rwkv_peft.ops.segments import goes_on
from rwkv_peft.state import LayerState

# 1e-5 of the other norms, times the square of the 8 by which RWKV-5 divided its heads
GROUP_NORM_EPS = 64e-5


def token_shift(x_BTD: Tensor, shift_BD: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The previous token's vector at each position; `shift_BD`, or zero, at the first.

    Zero also at the first token of each further document of a row (segment_ids (B, T)).
    """
    first = torch.zeros_like(x_BTD[:, :1]) if shift_BD is None else shift_BD.unsqueeze(1)
    shifted = torch.cat((first.to(x_BTD.dtype), x_BTD[:, :-1]), 1)
    if segment_ids is None:
        return shifted
    return shifted.masked_fill(~goes_on(segment_ids).unsqueeze(-1), 0)


class PlainBlock(nn.Module):
    """One layer of a version that hands on nothing beside x: norms around two mixers."""

    def __init__(self, geometry: Geometry, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(geometry.n_embd)
        self.ln1 = nn.LayerNorm(geometry.n_embd)
        self.ln2 = nn.LayerNorm(geometry.n_embd)
        self.att, self.ffn = att, ffn
        self.is_first = layer == 0

    def forward(
        self, x: Tensor, carry: None, state: LayerState | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, None, LayerState]:
        """x (B, T, D) for the next block, nothing beside it, and this layer's new state."""
        if self.is_first:
            x = self.ln0(x)
        att_in = self.ln1(x)
        mixed, wkv = self.att(att_in, state, segment_ids)
        x = x + mixed
        ffn_in = self.ln2(x)
        x = x + self.ffn(ffn_in, None if state is None else state.ffn_shift, segment_ids)
        return x, carry, LayerState(att_in[:, -1], ffn_in[:, -1], wkv)
