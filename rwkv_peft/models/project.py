"""Projections of a layer that are alike, with what their adapters can do together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def project(layers: Sequence[nn.Module], rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """What each layer gives for its rows, (..., in) as (..., out).

    Layers that an adapter was fused with may have a function `together`, of all layers and rows,
    which gives None where it does not serve. Compiled blocks ask it: without a compiler, joining
    rows is a pass over them.
    """
    together = getattr(layers[0], "together", None)
    if together is not None and torch.compiler.is_compiling():
        found: Sequence[Tensor] | None = together(layers, rows)
        if found is not None:
            return found
    return [layer(x) for layer, x in zip(layers, rows, strict=True)]
