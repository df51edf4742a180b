"""The WKV-6 recurrence token by token: the specification that all backends are tested against."""

import torch
from torch import Tensor

from rwkv_peft.ops.segments import goes_on


def wkv6_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and last state of the recurrence, one token after the other, by plain autograd.

    Runs in float64 where the inputs are float64, else in float32.

    Args:
        r, w, k, v: (B, T, H, N); the decay is exp(-exp(w)).
        u: (H, N), the weight of a token's own key.
        initial_state: (B, H, N, N), rows = value, columns = key; zeros if None.
        segment_ids: (B, T) int32; the state restarts where the number changes.
    Returns:
        y (B, T, H, N) in the dtype of `r`; last state (B, H, N, N) in the computing dtype.
    """
    dtype = torch.promote_types(r.dtype, torch.float32)
    B, _, H, N = r.shape
    if initial_state is None:
        state = torch.zeros(B, H, N, N, dtype=dtype, device=r.device)
    else:
        state = initial_state.to(dtype)
    decay = torch.exp(-torch.exp(w.to(dtype)))
    own = u.to(dtype).unsqueeze(-2)
    rows = [x.to(dtype).unsqueeze(-2).unbind(1) for x in (r, decay, k)]
    values = v.to(dtype).unsqueeze(-1).unbind(1)
    keep = None if segment_ids is None else goes_on(segment_ids)[..., None, None, None]
    y = []
    for t, (r_t, d_t, k_t, v_t) in enumerate(zip(*rows, values, strict=True)):
        if keep is not None:
            state = state * keep[:, t]
        written = v_t * k_t
        y.append(((state + own * written) * r_t).sum(-1))
        state = state * d_t + written
    return torch.stack(y, 1).to(r.dtype), state
