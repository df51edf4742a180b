"""WKV-7 token by token: the specification of all backends, and the error budget's baseline."""

import torch
from torch import Tensor

from rwkv_peft.ops.opaque import opaque
from rwkv_peft.ops.segments import goes_on

# log of the decay is -DECAY_SCALE * sigmoid(w): no RWKV-7 decay is below exp(-0.6065) = 0.545
DECAY_SCALE = 0.606530659712633  # exp(-1/2)


@opaque
def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and last state of the recurrence, one token after the other, by plain autograd.

    Runs in float64 where the inputs are float64, else in float32.

    Args:
        r, w, k, v, a, b: (B, T, H, N); `w` is the raw decay logit.
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
    decay = torch.exp(-DECAY_SCALE * torch.sigmoid(w.to(dtype)))
    rows = [x.to(dtype).unsqueeze(-2).unbind(1) for x in (r, decay, k, a, b)]
    values = v.to(dtype).unsqueeze(-1).unbind(1)
    keep = None if segment_ids is None else goes_on(segment_ids)[..., None, None, None]
    y = []
    for t, (r_t, d_t, k_t, a_t, b_t, v_t) in enumerate(zip(*rows, values, strict=True)):
        if keep is not None:
            state = state * keep[:, t]
        removed = (state * a_t).sum(-1, keepdim=True)
        state = state * d_t + removed * b_t + v_t * k_t
        y.append((state * r_t).sum(-1))
    return torch.stack(y, 1).to(r.dtype), state


def wkv7_baseline(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in the dtype of its inputs, state included, by matrix products of one token.

    Arguments and results are those of `wkv7_reference`. It is written as the `rwkv` package writes
    it for devices without a kernel, without care for precision: the baseline of the error budget.
    """
    B, T, H, N = r.shape
    state = r.new_zeros(B, H, N, N) if initial_state is None else initial_state.to(r.dtype)
    decay = torch.exp(-0.606530659712633 * torch.sigmoid(w))
    y, keep = [], None if segment_ids is None else goes_on(segment_ids)[..., None, None, None]
    for t in range(T):
        if keep is not None:
            state = state * keep[:, t]
        ab = a[:, t].unsqueeze(-1) @ b[:, t].unsqueeze(-2)
        vk = v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        state = state * decay[:, t].unsqueeze(-2) + state @ ab + vk
        y.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, 1), state.to(torch.promote_types(r.dtype, torch.float32))
