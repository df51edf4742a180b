"""WKV-6 token by token: the specification of all backends, and the error budget's baseline."""

import torch
from torch import Tensor

from rwkv_peft.ops.opaque import opaque
from rwkv_peft.ops.segments import goes_on


@opaque
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


def wkv6_baseline(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in the dtype of its inputs, state included, by matrix products of one token.

    Arguments and results are those of `wkv6_reference`. It is written as the `rwkv` package writes
    it for devices without a kernel, without care for precision: the baseline of the error budget.
    """
    B, T, H, N = r.shape
    state = r.new_zeros(B, H, N, N) if initial_state is None else initial_state.to(r.dtype)
    # exp(-exp(10)) is zero, and float16 ends at exp(11)
    decay = torch.exp(-torch.exp(w.clamp(max=10)))
    y, keep = [], None if segment_ids is None else goes_on(segment_ids)[..., None, None, None]
    for t in range(T):
        if keep is not None:
            state = state * keep[:, t]
        vk = v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        y.append(((u.unsqueeze(-2) * vk + state) @ r[:, t].unsqueeze(-1)).squeeze(-1))
        state = vk + decay[:, t].unsqueeze(-2) * state
    return torch.stack(y, 1), state.to(torch.promote_types(r.dtype, torch.float32))
