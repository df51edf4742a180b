"""Frozen layers whose weight is stored in 8 or 4 bits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.ops.dequantise import dequantise
from rwkv_peft.ops.dequantise.ahead import make_dense
from rwkv_peft.ops.dequantise.reference import (
    BLOCK,
    CODES,
    GROUP,
    GROUP_BYTES,
    expand,
    fill_up,
    share_table,
    span,
)

# numbers that are stored at a time, in whole blocks
PIECE = 1 << 22
# numbers of a weight that are dense at a time for a product, rows in whole blocks: that of the
# largest projection of 13.3B is, and a head is not
MAX_DENSE = 1 << 26


class QuantisedLinear(FrozenLinear):
    """y = x W^T for a weight in fewer bits: `weight` is packed, `scale` has its float32 scales.

    Both are plain frozen tensors. Stored is what the dense weight has in float32, whatever the
    dtype of the products, so that another machine stores the same.
    """

    scale: Tensor
    # of each number in `weight`
    bits = 8
    # the largest stored number
    _top = 1

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Stores a dense weight (out, in); products are of `dtype`."""
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0])
        self._dtype = dtype
        packed, scale = self._pack(weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)

    @classmethod
    def _pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The stored form of a weight, and its scales; it is float32 a piece at a time."""
        pieces = [cls._pack_piece(piece.float()) for piece in cls._split(weight)]
        packed, scales = zip(*pieces, strict=True)
        return torch.cat(packed), torch.cat(scales)

    @staticmethod
    def count_bytes(rows: int, width: int) -> int:
        """The memory that the stored form of a weight (rows, width) takes."""
        raise NotImplementedError

    @staticmethod
    def _split(weight: Tensor) -> Sequence[Tensor]:
        """Pieces that are stored independently: some rows."""
        return torch.split(weight, max(1, PIECE // weight.shape[1]))

    @classmethod
    def _pack_piece(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the weight is dequantised to."""
        return self._dtype

    @property
    def largest(self) -> Tensor:
        """The largest magnitudes of the dense weight, a scale each; not finite if it is not."""
        return (self.scale * self._top).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T of the last dimension of x, of which backward keeps the stored weight alone."""
        y: Tensor = torch.ops.rwkv_peft.stored_product(
            x, self.weight, self.scale, self.storage, self.out_features, self._dtype
        )
        return y

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        stored = self.weight, self.scale, self.storage, self.out_features, self._dtype
        torch.ops.rwkv_peft.add_stored_product(y, x, *stored)
        return y

    def add_transposed(self, dx: Tensor, dy: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        stored = self.weight, self.scale, self.storage, self.in_features, self._dtype
        torch.ops.rwkv_peft.add_stored_transposed(dx, dy, *stored)
        return dx

    def store(self, weight: Tensor) -> None:
        """Stores another dense weight (out, in)."""
        self.weight.data, self.scale = self._pack(weight.detach())


class Int8Linear(QuantisedLinear):
    """Whole numbers of 8 bits with one scale for each row."""

    storage = "int8"
    _top = 127

    @staticmethod
    def count_bytes(rows: int, width: int) -> int:
        """See `QuantisedLinear`."""
        return rows * width + 4 * rows

    @classmethod
    def _pack_piece(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        # a row of zeros has no scale to divide by
        packed = (weight / torch.where(scale == 0, 1, scale)).round_().clamp_(-127, 127)
        return packed.to(torch.int8), scale

    def dense(
        self, dtype: torch.dtype | None = None, rows: slice = slice(None), *, copy: bool = False
    ) -> Tensor:
        """See `FrozenLinear`; always a tensor of its own."""
        packed = self.weight.detach()[rows]
        found = dequantise(packed, self.scale[rows], self.storage, packed.numel(), self._dtype)
        return found.view(packed.shape).to(dtype or self._dtype)


class _BlockLinear(QuantisedLinear):
    """Codes of 4 bits, two a byte, the first in the upper half: `weight` is (out * in / 2, 1)."""

    bits = 4

    @staticmethod
    def count_bytes(rows: int, width: int) -> int:
        """See `QuantisedLinear`."""
        return -(-rows * width // 2) + 4 * -(-rows * width // BLOCK)

    @staticmethod
    def _split(weight: Tensor) -> Sequence[Tensor]:
        # a block may go on in the next row
        return torch.split(weight.flatten(), PIECE)

    @classmethod
    def _pack_piece(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        return pack_blocks(weight, cls.storage)

    def dense(
        self, dtype: torch.dtype | None = None, rows: slice = slice(None), *, copy: bool = False
    ) -> Tensor:
        """See `FrozenLinear`; always a tensor of its own."""
        first, last, _ = rows.indices(self.out_features)
        width = self.in_features
        start, end = first * width, max(first, last) * width
        # from the block or the group that the first row begins in
        at, before = divmod(start, span(self.storage))
        packed = self.weight.detach()[(start - before) // 2 : -(-end // 2)]
        count = end - start + before
        flat = dequantise(packed, self.scale[at:], self.storage, count, self._dtype)
        found = flat[before:].view(-1, width)
        return found.to(dtype or self._dtype)


class NF4Linear(_BlockLinear):
    """The nearest of 16 quantiles of a normal, times the largest of 64 numbers."""

    storage = "nf4"


class FP4Linear(_BlockLinear):
    """The nearest of 16 numbers of 4-bit floating point, times the largest of 64 numbers."""

    storage = "fp4"


class _NestedLinear(_BlockLinear):
    """Scales in 8 bits: `scale` is (groups of 256, 264) bytes, see `ops.dequantise`."""

    @staticmethod
    def count_bytes(rows: int, width: int) -> int:
        """See `QuantisedLinear`."""
        numbers = rows * width
        return -(-numbers // 2) + GROUP_BYTES * -(-numbers // (BLOCK * GROUP))

    @classmethod
    def _pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        packed, scale = super()._pack(weight)
        return packed, nest(scale)

    @property
    def largest(self) -> Tensor:
        """See `QuantisedLinear`."""
        return expand(self.scale).to(self._dtype)


class NestedNF4Linear(_NestedLinear):
    """As `NF4Linear`, with nested scales."""

    storage = "nf4_nested"


class NestedFP4Linear(_NestedLinear):
    """As `FP4Linear`, with nested scales."""

    storage = "fp4_nested"


def pack_blocks(flat: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """Codes (numbers / 2, 1) and scales (blocks,) of float32 numbers."""
    blocks = fill_up(flat).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    # multiplied by the reciprocal, as bitsandbytes does, and not divided: that rounds otherwise
    shares = (blocks * (1 / scale.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    code = torch.tensor(CODES[storage], device=flat.device)
    order = code.argsort(stable=True)
    middles = (code[order[:-1]] + code[order[1:]]) / 2
    places = torch.bucketize(shares.flatten()[: len(flat)], middles, out_int32=True)
    codes = order.to(torch.uint8)[places]
    codes = F.pad(codes, (0, len(flat) % 2)).view(-1, 2)
    return ((codes[:, 0] << 4) | codes[:, 1]).unsqueeze(1), scale


def nest(scale: Tensor) -> Tensor:
    """Scales (blocks,) less their mean in 8 bits, with it and each group's largest."""
    # in float64, in which the sum is exact, so that another machine stores the same
    mean = scale.to("cpu", torch.float64).mean().to(scale.device, torch.float32)
    groups = fill_up(scale - mean, GROUP).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True)
    shares = (groups * (1 / largest.clamp(min=1e-38))).clamp_(-1, 1)
    table = share_table(scale.device)
    places = torch.bucketize(shares, (table[:-1] + table[1:]) / 2, out_int32=True)
    ends = torch.cat((largest, mean.expand_as(largest)), 1).view(torch.uint8)
    return torch.cat((places.to(torch.uint8), ends), 1)


# single operations to a compiler, which would else keep the dense weight for backward
_library = torch.library.Library("rwkv_peft", "FRAGMENT")


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, storage: str, rows: int, dtype: torch.dtype
) -> Tensor:
    stored = packed, scale, storage, x.shape[-1], dtype
    first, *others = _split_rows(rows, x.shape[-1], storage)
    if not others:
        return F.linear(x, _dense_rows(*stored, first).to(x.dtype))
    y = x.new_empty((*x.shape[:-1], rows))
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, rows)
    for piece in (first, *others):
        torch.mm(flat_x, _dense_rows(*stored, piece).to(x.dtype).t(), out=flat_y[:, piece])
    return y


def _fake_product(x: Tensor, packed: Tensor, scale: Tensor, storage: str, rows: int, _: Any) -> Any:
    return x.new_empty((*x.shape[:-1], rows))


def _add_product(
    y: Tensor, x: Tensor, packed: Tensor, scale: Tensor, storage: str, rows: int, dtype: torch.dtype
) -> None:
    stored = packed, scale, storage, x.shape[-1], dtype
    for piece in _split_rows(rows, x.shape[-1], storage):
        y[:, piece].addmm_(x, _dense_rows(*stored, piece).t())


def _transposed(
    dy: Tensor, packed: Tensor, scale: Tensor, storage: str, width: int, dtype: torch.dtype
) -> Tensor:
    stored = packed, scale, storage, width, dtype
    first, *others = _split_rows(dy.shape[-1], width, storage)
    dx = torch.matmul(dy[..., first], _dense_rows(*stored, first).to(dy.dtype))
    if not others:
        return dx
    total = dx.to(torch.promote_types(dx.dtype, torch.float32))
    for piece in others:
        total += torch.matmul(dy[..., piece], _dense_rows(*stored, piece).to(dy.dtype))
    return total.to(dy.dtype)


def _add_transposed(
    dx: Tensor, dy: Tensor, packed: Tensor, scale: Tensor, storage: str, width: int, dtype: Any
) -> None:
    stored = packed, scale, storage, width, dtype
    first, *others = _split_rows(dy.shape[-1], width, storage)
    if others:
        dx += _transposed(dy, *stored)
    else:
        dx.addmm_(dy, _dense_rows(*stored, first))


def _split_rows(rows: int, width: int, storage: str) -> list[slice]:
    """Rows that are dense at a time, from whole blocks, or groups of them, on."""
    # both are powers of two
    least = max(BLOCK, span(storage) // math.gcd(span(storage), width))
    size = max(1, MAX_DENSE // width // least) * least
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _dense_rows(
    packed: Tensor, scale: Tensor, storage: str, width: int, dtype: torch.dtype, rows: slice
) -> Tensor:
    """These rows of a stored weight, (rows, width)."""
    count = (rows.stop - rows.start) * width
    if storage == "int8":
        packed, scale = packed[rows], scale[rows]
    else:
        first = rows.start * width
        packed = packed[first // 2 : -(-(first + count) // 2)]
        scale = scale[first // span(storage) :]
    return make_dense(packed, scale, storage, count, dtype).view(-1, width)


def _fake_transposed(
    dy: Tensor, packed: Tensor, scale: Tensor, storage: str, width: int, _: Any
) -> Any:
    return dy.new_empty((*dy.shape[:-1], width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, ctx.storage, _, ctx.dtype = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(packed, scale)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    packed, scale = ctx.saved_tensors
    dx = torch.ops.rwkv_peft.stored_transposed(dy, packed, scale, ctx.storage, ctx.width, ctx.dtype)
    return dx, None, None, None, None, None


def _register() -> None:
    given = "Tensor packed, Tensor scale, str storage, int width, ScalarType dtype"
    for name, first, function, fake in (
        ("stored_product", "x", _product, _fake_product),
        ("stored_transposed", "dy", _transposed, _fake_transposed),
    ):
        _library.define(f"{name}(Tensor {first}, {given}) -> Tensor")
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rwkv_peft::{name}", fake, lib=_library)
    for name, to, first, adding in (
        ("add_stored_product", "y", "x", _add_product),
        ("add_stored_transposed", "dx", "dy", _add_transposed),
    ):
        _library.define(f"{name}(Tensor(a!) {to}, Tensor {first}, {given}) -> ()")
        _library.impl(name, adding, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rwkv_peft::{name}", lambda *_: None, lib=_library)
    torch.library.register_autograd(
        "rwkv_peft::stored_product", _gradients, setup_context=_setup_context, lib=_library
    )


_register()
