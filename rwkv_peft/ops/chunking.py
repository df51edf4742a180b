"""Cutting time into chunks and putting it together again."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_chunks(x_BTHN: Tensor, chunk: int, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) as (M, B, H, C, N): M chunks of C = `chunk` tokens, padded by `fill`.

    Chunks come first so that what a scan over them touches is contiguous.
    """
    B, T, H, N = x_BTHN.shape
    if pad := -T % chunk:
        x_BTHN = F.pad(x_BTHN, (0, 0, 0, 0, 0, pad), value=fill)
    return x_BTHN.reshape(B, -1, chunk, H, N).permute(1, 0, 3, 2, 4)


def from_chunks(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """(M*B*H, C, N) as (B, T, H, N) of the given shape and dtype, in one pass."""
    B, T, H, N = shape
    C = x.shape[1]
    result = torch.empty(B, len(x) // (B * H), C, H, N, dtype=dtype, device=x.device)
    result.copy_(x.unflatten(0, (-1, B, H)).permute(1, 0, 3, 2, 4))
    return result.view(B, -1, H, N)[:, :T]
