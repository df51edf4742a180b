"""Frozen layers whose products are of 8-bit floating point, for cards that multiply it: `fp8`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.autograd import once_differentiable
from rwkv_peft.ops.products import add_product
from rwkv_peft.quant.linear import QuantisedLinear

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# what the products of cards want both sides of a weight to be multiples of
SIDE = 16


class FP8Linear(QuantisedLinear):
    """y = x W^T of x and W in e4m3 with a float32 scale a row, and dx = dy W of dy and W likewise.

    Each product wants scales along what is not summed over, so W is stored twice: `weight`
    (out, in) and `turned` (in, out), each with its scales. Together they take what bf16 does. Both
    are bytes, which no conversion of a model's floating-point tensors meets.
    """

    storage = "fp8"
    _top = int(LARGEST)
    turned: Tensor
    turned_scale: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Stores a dense weight (out, in); products give `dtype`.

        Raises:
            ConfigError: a side is no multiple of 16.
        """
        if any(side % SIDE for side in weight.shape):
            raise ConfigError(
                f"--quant fp8 multiplies weights whose sides are multiples of {SIDE}, and one is "
                f"{tuple(weight.shape)}: use --quant int8"
            )
        super().__init__(weight, dtype)
        turned, scale = self._pack(weight.detach().t())
        self.register_buffer("turned", turned)
        self.register_buffer("turned_scale", scale)

    @staticmethod
    def count_bytes(rows: int, width: int) -> int:
        """See `QuantisedLinear`."""
        return 2 * rows * width + 4 * (rows + width)

    @classmethod
    def _pack_piece(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        packed, scale = round_rows(weight)
        return packed.view(torch.uint8), scale

    def dense(
        self, dtype: torch.dtype | None = None, rows: slice = slice(None), *, copy: bool = False
    ) -> Tensor:
        """See `FrozenLinear`; always a tensor of its own."""
        packed = self.weight.detach()[rows].view(E4M3)
        return (packed.float() * self.scale[rows]).to(self._dtype).to(dtype or self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T of the last dimension of x, which is rounded if it has the dtype of training alone.

        What compares a merged weight with this layer multiplies in float32, and W is all it meets.
        """
        if x.dtype != self._dtype:
            return F.linear(x, self.dense(x.dtype))
        y: Tensor = _Product.apply(x, self.weight, self.scale, self.turned, self.turned_scale)
        return y

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        return y.add_(multiply(x, self.weight, self.scale))

    def add_transposed(self, dx: Tensor, dy: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        return dx.add_(multiply(dy, self.turned, self.turned_scale))

    # no product of FP8 adds to what is there, so the narrow one does
    def product_plus(self, x: Tensor, u: Tensor, b: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        return add_product(multiply(x, self.weight, self.scale), u, b)

    def transposed_plus(self, dy: Tensor, g: Tensor, a: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        return add_product(multiply(dy, self.turned, self.turned_scale), g, a)

    def store(self, weight: Tensor) -> None:
        """Stores another dense weight (out, in)."""
        super().store(weight)
        self.turned, self.turned_scale = self._pack(weight.detach().t())


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 numbers of x (rows, n) over a float32 scale (rows, 1), and that scale."""
    # a row of zeros has no scale to divide by
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / LARGEST
    # rounding may make the largest a trifle larger than e4m3 has
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3).contiguous(), scale


def multiply(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x W^T for x (..., in) and a stored W (out, in), in the dtype of x."""
    rows, row_scale = round_rows(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(
        rows, packed.view(E4M3).t(), scale_a=row_scale, scale_b=scale.t(), out_dtype=torch.bfloat16
    )
    return y.to(x.dtype).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, scale, turned, turned_scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(turned, turned_scale)
        return multiply(x, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        return multiply(dy, *ctx.saved_tensors), None, None, None, None
