"""Documents packed into a row: as a mask of tokens, as masks of chunks, as cumulative lengths.

Segment ids are (B, T) int32 and do not fall along a row; a document ends where the number changes.
An initial state belongs to the first document of its row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.ops.chunking import to_chunks


def goes_on(segment_ids: Tensor) -> Tensor:
    """(B, T) bool: whether a token belongs to the document of the token before it.

    It is true for the first token of a row, whose document takes the initial state. A caller that
    cuts a row into pieces and carries the state must not pass the state on where a document begins
    exactly at a cut: the document would inherit the state of the one before.

    Args:
        segment_ids: (B, T) int32.
    """
    return F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=True)


class Masks(NamedTuple):
    """Factors of 0 and 1 over (M, B, H, ...) chunks of C tokens; all None without segments."""

    same: Tensor | None = None  # (M, B, 1, C, C): both tokens are of one document
    enters: Tensor | None = None  # (M, B, 1, C, 1): the entering state is of the token's document
    leaves: Tensor | None = None  # (M, B, 1, C, 1): so is the leaving state
    carried: Tensor | None = None  # (M, B, 1, 1, 1): both states are of one document


def chunk_masks(segment_ids: Tensor | None, chunk: int, dtype: torch.dtype, rows: int = 1) -> Masks:
    """Masks of what the tokens and states of each chunk may see of each other.

    Args:
        segment_ids: (B, T) int32, or None for no masks.
        rows: how often the tokens of a chunk are listed: C is rows * chunk in the masks.
    """
    if segment_ids is None:
        return Masks()
    T = segment_ids.shape[1]
    # padding tokens belong to the last document
    padded = torch.cat((segment_ids, segment_ids[:, -1:].expand(-1, -T % chunk)), 1)
    ids = to_chunks(padded[:, :, None, None], chunk)
    ids, last = ids.repeat(1, 1, 1, rows, 1), ids[..., -1:, :]
    before = torch.cat((ids[:1, ..., :1, :], last[:-1]))
    found = (ids == ids.mT, ids == before, ids == last, last == before)
    return Masks(*(mask.to(dtype) for mask in found))


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (M*B*H, ...) times a mask (M, B, 1, ...); x itself if the mask is None."""
    if mask is None:
        return x
    by_row: Tensor = x.unflatten(0, (*mask.shape[:2], -1))
    return (by_row * mask).flatten(0, 2)


class Documents(NamedTuple):
    """The documents of all rows one after the other, for kernels that take cumulative lengths."""

    cu_seqlens: Tensor  # (documents + 1,) int64: where each begins in B*T tokens, and the end
    first: Tensor  # (B,) the index of each row's first document
    last: Tensor  # (B,) and of its last


def find_documents(segment_ids: Tensor) -> Documents:
    """The documents of segment ids (B, T); their number is data, so a GPU is waited for."""
    begins = ~goes_on(segment_ids)
    begins[:, 0] = True
    numbers = begins.flatten().cumsum(0).view(begins.shape) - 1
    starts = begins.flatten().nonzero().flatten()
    return Documents(F.pad(starts, (0, 1), value=begins.numel()), numbers[:, 0], numbers[:, -1])
