"""WKV-7 through the Triton kernels of flash-linear-attention (extra `fla`)."""

from typing import Any

import torch
from torch import Tensor

from rwkv_peft.ops.fla import run_fla
from rwkv_peft.ops.opaque import opaque
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE


@opaque
def wkv7_fla(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `wkv7_reference`; fla takes log decays and states (K, V)."""
    from fla.ops.rwkv7 import chunk_rwkv7

    log_decay = torch.sigmoid(w.float()) * -DECAY_SCALE

    def kernel(rows: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        y, state = chunk_rwkv7(*rows, lower_bound=-DECAY_SCALE, **options)
        return y, state

    return run_fla(kernel, [r, log_decay, k, v, a, b], initial_state, segment_ids)
