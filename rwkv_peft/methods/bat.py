"""MiSS's mode bat with a block for each part of the inputs, as older RWKV-PEFT has it.

Its weight is W + W[o, i] D[i] + D[i] for the block of outputs o and inputs i, each (R, R), where
peft has D[o]. Peft's own arithmetic broadcasts: blocks (in/R, 1, R, R) make it this one.
"""

import torch
from torch import nn


@torch.no_grad()
def lay_along_inputs(model: nn.Module) -> None:
    """Makes the blocks of all bat layers zeros (in/R, 1, R, R)."""
    from peft.tuners.miss.layer import MissLinear

    for layer in model.modules():
        if isinstance(layer, MissLinear) and layer.miss_fn == "bat":
            for name, block in layer.miss_block.items():
                rank = layer.miss_r[name]
                block.data = block.new_zeros(layer.in_features // rank, 1, rank, rank)
