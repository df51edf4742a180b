"""Which tokens of a document are trained: spans of its text, mapped to the tokens they touch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.records import Piece
from rwkv_peft.errors import ConfigError

MASKS = ("auto", "none", "pad", "qa", "se")


class Span(NamedTuple):
    """Bytes [start, end) of a document's UTF-8 text that are trained with a weight."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Mask:
    """A choice of the tokens that are trained.

    Attributes:
        roles: roles whose words are trained; None: all.
        has_heads: whether the words that open a chosen turn are trained too.
        marks: (off, on), the bytes between which `se` trains, whatever the roles; None: no marks.
        skips_plain_text: whether a document without turns is not masked.
    """

    roles: frozenset[str] | None = None
    has_heads: bool = False
    marks: tuple[bytes, bytes] | None = None
    skips_plain_text: bool = False

    @property
    def is_all(self) -> bool:
        """Whether it masks nothing."""
        return self.roles is None and self.marks is None

    def find_spans(self, pieces: Sequence[Piece]) -> tuple[list[Span], float]:
        """The trained spans of a document, and the loss weight of its end-of-document token.

        The end of a document is trained as the end of its last turn.
        """
        if self.marks is not None:
            text = "".join(piece.text for piece in pieces).encode("utf-8", "surrogateescape")
            return _find_between(text, *self.marks, has_heads=self.has_heads)
        spans, position, weight = [], 0, 0.0
        for piece in pieces:
            end = position + len(piece.text.encode("utf-8", "surrogateescape"))
            is_chosen = self.roles is None or piece.role in self.roles
            weight = piece.weight if is_chosen else 0.0
            if weight and (piece.part != "head" or self.has_heads or self.roles is None):
                spans.append(Span(position, end, weight))
            position = end
        return spans, weight


def _find_between(
    text: bytes, off: bytes, on: bytes, *, has_heads: bool
) -> tuple[list[Span], float]:
    spans, position = [], text.find(on)
    while position >= 0:
        start = position if has_heads else position + len(on)
        end = text.find(off, position + len(on))
        spans.append(Span(start, len(text) if end < 0 else end))
        if end < 0:
            return spans, 1.0
        position = text.find(on, end + len(off))
    return spans, 0.0


def find_mask(
    loss_mask: str,
    *,
    mask_id: Mapping[str, str] | None = None,
    has_heads: bool = False,
    vocabulary: Mapping[int, bytes] | None = None,
) -> Mask:
    """The mask of a name, as --loss_mask takes it.

    Args:
        mask_id: the marks of `se`: mask0 ends what is trained and mask1 begins it, each a text or
            token ids.
        vocabulary: bytes of each id, for marks that are given as ids.
    Raises:
        ConfigError: there is no such mask, or `se` lacks its marks.
    """
    name, _, rest = loss_mask.partition("=")
    if name == "roles":
        roles = frozenset(role.strip() for role in rest.split(",") if role.strip())
        if not roles:
            raise ConfigError("--loss_mask roles= names no role: give roles=assistant,tool")
        return Mask(roles, has_heads)
    if loss_mask not in MASKS:
        raise ConfigError(
            f"--loss_mask {loss_mask}: allowed is {', '.join(MASKS)}, or roles=assistant,tool"
        )
    if name == "se":
        given = mask_id or {}
        off, on = (_parse_mark(key, given.get(key), vocabulary or {}) for key in ("mask0", "mask1"))
        if off == on:
            raise ConfigError("--mask_id: mask0 and mask1 are the same; they must differ")
        return Mask(marks=(off, on), has_heads=has_heads)
    if name in ("none", "pad"):
        return Mask()
    return Mask(frozenset(["assistant"]), has_heads, skips_plain_text=name == "auto")


def _parse_mark(key: str, value: str | None, vocabulary: Mapping[int, bytes]) -> bytes:
    if not value:
        raise ConfigError(
            "--loss_mask se needs the marks between which it trains, as texts or token ids: "
            '--mask_id \'{"mask0": "<|user|>", "mask1": "<|assistant|>"}\'; there is no ' + key
        )
    if not re.fullmatch(r"[\d\s,\[\]]+", value):
        return value.encode()
    ids = [int(number) for number in re.findall(r"\d+", value)]
    mark = b"".join(vocabulary.get(token, b"") for token in ids)
    if not mark:
        raise ConfigError(f"--mask_id: the token ids {value} of {key} have no text")
    return mark


def weigh_tokens(
    ids: NDArray[np.integer], lengths: NDArray[np.int64], spans: Iterable[Span]
) -> NDArray[np.float32]:
    """The loss weight of each token, (T,) float32: the largest of the spans that it touches.

    A token that lies across the border of a span belongs to it: the model must give that token to
    give the span's first or last bytes.

    Args:
        ids: (T,) tokens of the whole text.
        lengths: (V,) bytes of each id of the vocabulary.
    """
    ends = np.cumsum(lengths[ids])
    weights = np.zeros(len(ids), dtype=np.float32)
    for start, end, weight in spans:
        if start == end:
            continue
        # the first token that ends after the span begins, and the first that begins at its end
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, end, side="left")) + 1
        np.maximum(weights[first:last], weight, out=weights[first:last])
    return weights
