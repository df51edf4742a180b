"""Documents packed into a row: where they begin, seen from a token, from a chunk, as lengths.

Segment numbers are (B, T) int32 and do not fall along a row; a document ends where the number
changes. A state that is given belongs to the first document of its row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.ops.chunking import to_chunks


def goes_on(segment_ids: Tensor) -> Tensor:
    """(B, T) bool: whether a token is of the document of the one before it; true for the first."""
    return F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=True)


class Masks(NamedTuple):
    """Factors of 0 and 1 over (M, B, H, ...) chunks of C tokens; all None without segments."""

    same: Tensor | None = None  # (M, B, 1, C, C): both tokens are of one document
    enters: Tensor | None = (
        None  # (M, B, 1, C, 1): the state that enters is of the token's document
    )
    leaves: Tensor | None = None  # (M, B, 1, C, 1): so is the state that leaves
    carried: Tensor | None = None  # (M, B, 1, 1, 1): both states are of one document


def chunk_masks(segment_ids: Tensor | None, chunk: int, dtype: torch.dtype, rows: int = 1) -> Masks:
    """What tokens and states of each chunk may see of each other.

    With two `rows` a token the C tokens are listed twice, so that C is 2 * chunk in the masks.
    """
    if segment_ids is None:
        return Masks()
    T = segment_ids.shape[1]
    # padding tokens are of the last document
    padded = torch.cat((segment_ids, segment_ids[:, -1:].expand(-1, -T % chunk)), 1)
    ids = to_chunks(padded[:, :, None, None], chunk)
    ids, last = ids.repeat(1, 1, 1, rows, 1), ids[..., -1:, :]
    before = torch.cat((ids[:1, ..., :1, :], last[:-1]))
    found = (ids == ids.mT, ids == before, ids == last, last == before)
    return Masks(*(mask.to(dtype) for mask in found))


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """(M*B*H, ...) times a mask (M, B, 1, ...); x itself if there is none."""
    if mask is None:
        return x
    by_row: Tensor = x.unflatten(0, (*mask.shape[:2], -1))
    return (by_row * mask).flatten(0, 2)


class Documents(NamedTuple):
    """The documents of all rows one after the other, for kernels that take lengths."""

    cu_seqlens: Tensor  # (documents + 1,) int64: where each begins in B*T tokens, and the end
    first: Tensor  # (B,) the first document of each row
    last: Tensor  # (B,)


def find_documents(segment_ids: Tensor) -> Documents:
    """Finds the documents; their number is data, so a GPU is waited for."""
    begins = ~goes_on(segment_ids)
    begins[:, 0] = True
    numbers = begins.flatten().cumsum(0).view(begins.shape) - 1
    starts = begins.flatten().nonzero().flatten()
    return Documents(F.pad(starts, (0, 1), value=begins.numel()), numbers[:, 0], numbers[:, -1])
