"""WKV-6 through the Triton kernels of flash-linear-attention (extra `fla`)."""

from typing import Any

from torch import Tensor

from rwkv_peft.ops.fla import run_fla
from rwkv_peft.ops.opaque import opaque

# exp(-exp(2.5)) = 5e-6 is nothing beside bf16's 4e-3. fla takes differences of sums of log decays,
# in which one that is much stronger leaves less of the others: up to 3 the gradient of w has 1.5
# times its error budget, up to 2.5 at most 0.7 times
MAX_LOGIT = 2.5


@opaque
def wkv6_fla(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `wkv6_reference`; fla takes log decays and states (K, V)."""
    from fla.ops.rwkv6 import chunk_rwkv6

    log_decay = -w.float().clamp(max=MAX_LOGIT).exp()

    def kernel(rows: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        r, log_decay, k, v = rows
        y, state = chunk_rwkv6(r, k, v, log_decay, u, scale=1.0, **options)
        return y, state

    return run_fla(kernel, [r, log_decay, k, v], initial_state, segment_ids)
