"""Which base an adapter belongs to."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_peft.checkpoint.pth import STATE_SUFFIX

# rows of each sampled tensor: a tuned model differs from its base in every row
ROWS = 8


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that identify a model's weights.

    A hash of names, shapes and the first rows of every matrix of the first, middle and last block,
    rounded to bf16, so that the same weights in another type or file format are the same base.
    """
    layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
    blocks = tuple(f"blocks.{i}." for i in {0, layers // 2, layers - 1})
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name.endswith(STATE_SUFFIX):
            continue  # a base whose file also holds a learned state is still the same base
        x = weights[name]
        digest.update(f"{name}{tuple(x.shape)}".encode())
        if x.ndim == 2 and name.startswith(blocks):
            sample = x[:ROWS].to(torch.bfloat16).contiguous()
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
