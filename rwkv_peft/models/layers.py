"""Layers that several versions share. B batch, T time, D width."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.models.config import ModelConfig
from rwkv_peft.ops.autograd import once_differentiable
from rwkv_peft.ops.segments import goes_on
from rwkv_peft.state import LayerState

# 1e-5 of the other norms, times the square of the 8 by which RWKV-5 divided its heads
GROUP_NORM_EPS = 64e-5


class PackingInfo(NamedTuple):
    """Where further documents begin in the rows of a batch; None both if a row is one document.

    Attributes:
        segment_ids: (B, T) int32, numbers the documents of a row.
        begins: (B, T, 1) bool, whether a token is the first of a further document.
    """

    segment_ids: Tensor | None = None
    begins: Tensor | None = None

    @classmethod
    def of(cls, segment_ids: Tensor | None) -> Self:
        """Made once a forward, for all layers."""
        if segment_ids is None:
            return cls()
        return cls(segment_ids, ~goes_on(segment_ids).unsqueeze(-1))


def token_shift(x_BTD: Tensor, shift_BD: Tensor | None, packing: PackingInfo) -> Tensor:
    """The previous token's vector at each position, (B, T, D).

    Args:
        x_BTD: (B, T, D).
        shift_BD: (B, D), what stands before the first token of a row; zeros if None. Zeros stand
            before the first token of each further document.
    """
    shifted = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
    if shift_BD is not None:
        # a sum, as a compiler would lay what is joined into memory of its own
        first = shift_BD.to(x_BTD.dtype).unsqueeze(1)
        shifted = shifted + F.pad(first, (0, 0, 0, x_BTD.shape[1] - 1))
    return shifted if packing.begins is None else shifted.masked_fill(packing.begins, 0)


def shift_mix(
    x: Tensor,
    shift: Tensor | None,
    packing: PackingInfo,
    mix: Tensor | Sequence[Tensor],
    sizes: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """x + (token_shift(x) - x) * m for each m of `mix`, as rows (B*T, D).

    Args:
        x: (B, T, D).
        shift: (B, D), as in `token_shift`.
        mix: M vectors (1, 1, D), or (M, B*T, D) where it depends on the token.
        sizes: how many of the M are made in one launch, such as (3, 3); what one launch makes
            shares memory, which is freed when all of it is. Empty: each has a launch of its own.
    """
    if torch.compiler.is_compiling():
        rows = x.flatten(0, 1)
        xx = token_shift(x, shift, packing).flatten(0, 1) - rows
        # no addcmul, whose backward has a kernel for a factor of 1
        return tuple(rows + xx * m.view(-1, x.shape[-1]) for m in mix)
    together = mix if isinstance(mix, Tensor) else torch.cat(list(mix))
    mixed: tuple[Tensor, ...] = _ShiftMix.apply(x, shift, packing.begins, together, sizes)
    return mixed


def shift_mix_products(
    x: Tensor,
    shift: Tensor | None,
    packing: PackingInfo,
    mix: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The rows of `shift_mix` times a matrix each, for a compiler, as one product of x.

    (x + (x' - x) m) W is x ((1 - m) W) + x' (m W), and the rows of x' are those of x: so the mixed
    rows are never written.

    Args:
        mix: a vector of D numbers each.
        weights: (D, n) each, narrow.
    """
    widths = [w.shape[1] for w in weights]
    shares = [m.view(-1, 1) for m in mix]
    near = [(1 - m) * w for m, w in zip(shares, weights, strict=True)]
    far = [m * w for m, w in zip(shares, weights, strict=True)]
    both = x.flatten(0, 1) @ torch.cat((*near, *far), 1)
    own, last = both.view(*x.shape[:2], -1).split(sum(widths), 2)
    before = None if shift is None else shift.to(x.dtype) @ torch.cat(far, 1)
    products = (own + token_shift(last, before, packing)).flatten(0, 1)
    return tuple(products.split(widths, 1))


class _ShiftMix(torch.autograd.Function):
    """One function, as autograd's own operations take 3 launches more forward and 12 backward.

    A compiler does as well with the formula, which it fuses with what stands around it.
    """

    @staticmethod
    def forward(ctx, x, shift, begins, mix, sizes):  # type: ignore[no-untyped-def]
        xx = _to_last(x, shift, begins)
        # x and not xx, so that a second mix of the same x keeps nothing more
        ctx.save_for_backward(mix, begins, *((x, shift) if ctx.needs_input_grad[3] else ()))
        ctx.shape = x.shape
        rows = x.reshape(xx.shape)
        if not sizes:
            return tuple(torch.addcmul(rows, xx, m) for m in mix.unbind())
        return tuple(y for m in mix.split(sizes) for y in torch.addcmul(rows, xx, m).unbind())

    @staticmethod
    @once_differentiable
    def backward(ctx, *dy):  # type: ignore[no-untyped-def]
        mix, begins, *kept = ctx.saved_tensors
        dshift = dmix = None
        dys = torch.stack(dy) if len(dy) > 1 else dy[0].unsqueeze(0)
        if kept:
            x, shift = kept
            dmix = (dys * _to_last(x, shift, begins)).sum_to_size(mix.shape)
        if len(dy) > 1:
            total, dlast = dys.sum(0), dys.mul_(mix).sum(0)
        else:
            total, dlast = dy[0], dy[0] * mix[0]
        dx, dlast = (total - dlast).view(ctx.shape), dlast.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dshift = dlast[:, 0]
        before = dlast[:, 1:]
        if begins is not None:
            before = before.masked_fill(begins[:, 1:], 0)
        dx[:, :-1].add_(before)
        return dx, dshift, None, dmix, None


def _to_last(x: Tensor, shift: Tensor | None, begins: Tensor | None) -> Tensor:
    """token_shift(x) - x, as rows (B*T, D)."""
    xx = x.neg()
    last = x[:, :-1]
    xx[:, 1:].add_(last if begins is None else last.masked_fill(begins[:, 1:], 0))
    if shift is not None:
        xx[:, 0].add_(shift)
    return xx.view(-1, x.shape[-1])


class _SquaredReLU(torch.autograd.Function):
    """Its backward passes twice over the widest tensor of a layer, autograd's own four times."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        relu = torch.relu(x)
        ctx.save_for_backward(relu)
        return relu * relu

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (relu,) = ctx.saved_tensors
        return (dy * relu).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 of any shape."""
    if torch.compiler.is_compiling():
        # its backward asks for x, which is there already, and not for the ReLU, which is not
        return x.clamp(min=0).square()
    y: Tensor = _SquaredReLU.apply(x)
    return y


def vectors(num: int, width: int) -> list[nn.Parameter]:
    """So many parameters (1, 1, width) that are yet to be loaded."""
    return [nn.Parameter(torch.empty(1, 1, width)) for _ in range(num)]


def low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The two factors of a low-rank map, (width, rank) and (rank, width), yet to be loaded."""
    return nn.Parameter(torch.empty(width, rank)), nn.Parameter(torch.empty(rank, width))


class Block(nn.Module):
    """One layer: norms around two mixers.

    `att(x, carry, state, packing)` gives mixed x, the carry and the new wkv state. The carry is
    what a layer hands to the next beside x: the first layer's values in RWKV-7, else None.
    """

    def __init__(
        self, model_config: ModelConfig, layer: int, att: nn.Module, ffn: nn.Module
    ) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(model_config.n_embd)
        self.ln1 = nn.LayerNorm(model_config.n_embd)
        self.ln2 = nn.LayerNorm(model_config.n_embd)
        self.att, self.ffn = att, ffn
        self.is_first = layer == 0

    def forward(
        self, x: Tensor, carry: Tensor | None, state: LayerState | None, packing: PackingInfo
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """x (B, T, D) and the carry for the next block, and this layer's new state."""
        if self.is_first:
            x = self.ln0(x)
        att_in = self.ln1(x)
        mixed, carry, wkv = self.att(att_in, carry, state, packing)
        x = x + mixed
        ffn_in = self.ln2(x)
        x = x + self.ffn(ffn_in, None if state is None else state.ffn_shift, packing)
        last = att_in[:, -1], ffn_in[:, -1]
        if torch.compiler.is_compiling():
            # as views they would keep the whole tensors, which a compiler makes of copies too
            att_last, ffn_last = torch.stack(last).unbind()
            last = att_last, ffn_last
        return x, carry, LayerState(*last, wkv)
