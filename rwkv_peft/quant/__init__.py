"""Frozen weights stored in 8 or 4 bits, or multiplied in 8: `--quant`.

The projections of time mixing and channel mixing are stored, and with `--quant_head 1` the head;
embedding, norms, low-rank maps and vectors stay as they are. A weight is dequantised to the dtype
of the activations for each product, forward and for the gradient of the input; what backward keeps
is the stored form. fp8 is for speed alone: activations and gradients are rounded as the weights
are, and products are of fp8.

| name | storage | numbers |
|---|---|---|
| int8 | int8 (out, in), a float32 scale a row | round(w / scale), scale = largest / 127 |
| nf4 | two numbers a byte, a float32 scale for 64 | the nearest of 16 quantiles of a normal |
| fp4 | as nf4 | the nearest of 16 numbers of 4-bit floating point |
| nf4_nested, fp4_nested | scales in 8 bits | scales less their mean, over the largest of 256 |
| fp8 | bytes (out, in) and (in, out), a float32 scale a row | e4m3, scale = largest / 448 |

nf4 and fp4 have the layout and the numbers of bitsandbytes; nested scales (QLoRA's double
quantisation) its numbers alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.quant.fp8 import FP8Linear
from rwkv_peft.quant.linear import (
    FP4Linear,
    Int8Linear,
    NestedFP4Linear,
    NestedNF4Linear,
    NF4Linear,
    QuantisedLinear,
)

STORAGES: dict[str, type[QuantisedLinear]] = {
    layer.storage: layer
    for layer in (
        Int8Linear,
        NF4Linear,
        FP4Linear,
        NestedNF4Linear,
        NestedFP4Linear,
        FP8Linear,
    )
}


class Storage(NamedTuple):
    """How weights are stored.

    Attributes:
        name: of `STORAGES`.
        dtype: to which they are dequantised.
        has_head: the head is stored too.
    """

    name: str
    dtype: torch.dtype
    has_head: bool = False

    @property
    def note(self) -> dict[str, Any]:
        """It in the values of JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"storage": self.name, "dtype": dtype, "head": self.has_head}


def quantise(weight: Tensor, storage: Storage) -> QuantisedLinear:
    """A frozen layer that stores a dense weight (out, in)."""
    return STORAGES[storage.name](weight, storage.dtype)


def round_trip(weight: Tensor, storage: Storage) -> Tensor:
    """A dense weight as a layer that stores it computes with it."""
    return quantise(weight, storage).dense()


def stored_layers(
    model: nn.Module, *, has_head: bool = False
) -> Iterator[tuple[str, FrozenLinear]]:
    """The layers of a plain model that `--quant` stores, by name: all projections but the head.

    Args:
        has_head: and the head.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear) and (has_head or name.startswith("blocks.")):
            yield name, layer


def find_storage(model: nn.Module) -> Storage | None:
    """How a model, adapted or not, has its projections stored; None: dense."""
    layers = [(n, x) for n, x in model.named_modules() if isinstance(x, FrozenLinear) and x.storage]
    if not layers:
        return None
    _, first = layers[0]
    has_head = any("blocks." not in name for name, _ in layers)
    return Storage(first.storage, first.compute_dtype, has_head)
