"""WKV-7 through the Triton kernels of flash-linear-attention (extra `fla`)."""

import torch
from torch import Tensor

from rwkv_peft.ops.wkv7.reference import DECAY_SCALE


def wkv7_fla(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `wkv7_reference`; fla takes log decays and states (K, V)."""
    from fla.ops.rwkv7 import chunk_rwkv7

    log_decay = torch.sigmoid(w.float()) * -DECAY_SCALE
    y, state = chunk_rwkv7(
        r,
        log_decay,
        k,
        v,
        a,
        b,
        initial_state=None if initial_state is None else initial_state.mT.contiguous(),
        output_final_state=True,
        lower_bound=-DECAY_SCALE,
    )
    return y.to(r.dtype), state.mT.float()
