"""MiSS in forms that peft does not have.

Older RWKV-PEFT's bat has a block for each part of the inputs: the weight is W + W[o, i] D[i] + D[i]
for the block of outputs o and inputs i, each (R, R), where peft has D[o]. Peft's own arithmetic
broadcasts, so that blocks (in/R, 1, R, R) make it this one.
"""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def lay_along_inputs(model: nn.Module) -> None:
    """Makes the blocks of all bat layers zeros (in/R, 1, R, R)."""
    from peft.tuners.miss.layer import MissLinear

    for layer in model.modules():
        if isinstance(layer, MissLinear) and layer.miss_fn == "bat":
            for name, block in layer.miss_block.items():
                rank = layer.miss_r[name]
                block.data = block.new_zeros(layer.in_features // rank, 1, rank, rank)


def as_lora(layer: Any) -> tuple[Tensor, Tensor] | None:
    """A (R, in) and B (out, R) with B A equal to the change of a MiSS layer, None for bat.

    Input j meets row j mod R of the block D (R, out): A says so, and B is D transposed.
    """
    (name,) = layer.miss_block
    if layer.miss_fn == "bat":
        return None
    block = whole_block(layer, name).detach()
    a = shards(len(block), layer.in_features, block.device)
    return a.to(block.dtype), block.T.contiguous()


def whole_block(layer: Any, name: str) -> Tensor:
    """What every shard of R inputs is multiplied with, (R, out); not for bat."""
    block: Tensor = layer._modules["miss_block"]._parameters[name]
    if layer.miss_fn == "mini":
        block = block.repeat(1, layer.out_features // layer.miss_mini_r[name])
    return block


def shards(rank: int, width: int, device: torch.device) -> Tensor:
    """Which inputs meet which row of a block, (R, in): identity matrices, the last perhaps cut."""
    columns = torch.arange(width, device=device)
    return columns % rank == torch.arange(rank, device=device).unsqueeze(1)
