"""Layers that all versions share. B batch, T time, D width."""

import torch
from torch import Tensor


def token_shift(x_BTD: Tensor, shift_BD: Tensor | None) -> Tensor:
    """The previous token's vector at each position; `shift_BD`, or zero, at the first."""
    first = torch.zeros_like(x_BTD[:, :1]) if shift_BD is None else shift_BD.unsqueeze(1)
    return torch.cat((first.to(x_BTD.dtype), x_BTD[:, :-1]), 1)
