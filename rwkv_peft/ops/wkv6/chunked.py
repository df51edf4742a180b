"""WKV-6 in chunks of time, for any decay: no factor is ever above one.

With g_t the sum of log decays of a chunk up to token t, the chunk is

    A_ti = sum over channels of r_t e^{g_{t-1} - g_i} k_i
    y_t = (r_t e^{g_{t-1}}) S_0^T + sum_{i<t} A_ti v_i + (r_t u k_t) v_t
    S_C = S_0 e^{g_C} + sum_i v_i (k_i e^{g_C - g_i})^T.

RWKV-5 and 6 decays have no lower bound, so that e^{g_{t-1}} and e^{-g_i} cannot be taken apart as
in RWKV-7. Instead A is made in halves: tokens t of a late half and i of the early half before it
are both measured from the border between them, e^{g_{t-1} - g_b} e^{g_b - g_i}, with both exponents
below zero; what is left is two halves of the same kind. Gradients of the decays are summed in the
same order, each term with its decay in it, so that nothing has to cancel.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.chunking import from_chunks, to_chunks
from rwkv_peft.ops.opaque import opaque
from rwkv_peft.ops.segments import Masks, apply_mask, chunk_masks

CHUNK = 32
# exp(-exp(30)) is zero in every dtype, and exp of larger logits would overflow
MAX_LOGIT = 30.0


@opaque
def wkv6_chunked(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence by chunks of 32 tokens in plain PyTorch, with a backward of its own.

    Same arguments and results as `wkv6_reference`, on any device.
    """
    y, state = _ChunkedWkv6.apply(r, w, k, v, u, initial_state, segment_ids)
    return y, state


def _flat_chunks(x_BTHN: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) as (M*B*H, C, N) in the computing dtype."""
    x = to_chunks(x_BTHN, CHUNK, fill).to(dtype)
    return x.reshape(-1, CHUNK, x.shape[-1])


class _Halves(NamedTuple):
    """One level of halving: m pairs of an early and a late half of s tokens."""

    size: int
    to_border: Tensor  # (n, m, s, N): e^{g_b - g_i} of the early tokens
    from_border: Tensor  # (n, m, s, N): e^{g_{t-1} - g_b} of the late ones


def _early(x: Tensor, size: int) -> Tensor:
    """Of (n, C, N), the view (n, m, s, N) of the early halves."""
    halves: Tensor = x.unflatten(1, (-1, 2, size))
    return halves[:, :, 0]


def _late(x: Tensor, size: int) -> Tensor:
    halves: Tensor = x.unflatten(1, (-1, 2, size))
    return halves[:, :, 1]


def _levels(log_decay: Tensor) -> Iterator[_Halves]:
    size = CHUNK // 2
    while size:
        to_border = _later(_early(log_decay, size)).exp_()
        from_border = _earlier(_late(log_decay, size)).exp_()
        yield _Halves(size, to_border, from_border)
        size //= 2


def _blocks(A: Tensor, size: int) -> Tensor:
    """Of (n, C, C), the view (n, s, s, m) of the blocks that pair late with early halves."""
    m = CHUNK // (2 * size)
    parts = A.view(-1, m, 2, size, m, 2, size)[:, :, 1, :, :, 0, :]
    return parts.diagonal(dim1=1, dim2=3)


def _earlier(x: Tensor) -> Tensor:
    """Along the tokens (dim -2), the sum of what comes before each.

    It is not a running sum minus the token itself: a decay may be so strong that nothing of the
    others would be left in the difference.
    """
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _later(x: Tensor) -> Tensor:
    """Along the tokens (dim -2), the sum of what comes after each."""
    return _earlier(x.flip(-2)).flip(-2)


def _state_decays(log_decay: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Decays from the entering state to each token, from each to the leaving state, over all.

    (n, C, N), (n, C, N), (n, 1, N), masked by documents.
    """
    return (
        apply_mask(_earlier(log_decay).exp_(), masks.enters),
        apply_mask(_later(log_decay).exp_(), masks.leaves),
        apply_mask(log_decay.sum(1, keepdim=True).exp_(), masks.carried),
    )


class _ChunkedWkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r, w, k, v, u, initial_state, segment_ids):  # type: ignore[no-untyped-def]
        B, _, H, N = r.shape
        dtype = torch.promote_types(r.dtype, torch.float32)
        masks = chunk_masks(segment_ids, CHUNK, dtype)
        # padding tokens have decay 1 (logit -inf) and zero k: they leave the state as it is
        log_decay = _flat_chunks(w, dtype, fill=-torch.inf).clamp(max=MAX_LOGIT).exp_().neg_()
        rc, kc, vc = (_flat_chunks(x, dtype) for x in (r, k, v))
        A = rc.new_zeros(len(rc), CHUNK, CHUNK)
        for level in _levels(log_decay):
            early = _early(kc, level.size) * level.to_border
            late = _late(rc, level.size) * level.from_border
            _blocks(A, level.size).copy_((late @ early.mT).permute(0, 2, 3, 1))
        own = u.to(dtype).repeat(len(rc) // H, 1).unsqueeze(1)
        A.diagonal(dim1=1, dim2=2).copy_((rc * own * kc).sum(-1))
        A = apply_mask(A, masks.same)

        before, rest, whole = _state_decays(log_decay, masks)
        added = vc.mT @ (kc * rest)
        states = torch.empty_like(added)
        state = added.new_zeros(B * H, N, N)
        if initial_state is not None:
            state += initial_state.reshape(B * H, N, N)
        for m in range(0, len(states), B * H):
            chunk = slice(m, m + B * H)
            states[chunk] = state
            state = torch.addcmul(added[chunk], state, whole[chunk])
        y = ((rc * before) @ states.mT).baddbmm_(A, vc)

        ctx.save_for_backward(rc, log_decay, kc, vc, u, A, states, segment_ids)
        ctx.shape, ctx.dtypes = r.shape, (r.dtype, w.dtype)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return from_chunks(y, r.shape, r.dtype), state.reshape(B, H, N, N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy, dstate = grads
        r, log_decay, k, v, u, A, states, segment_ids = ctx.saved_tensors
        B, _, H, N = ctx.shape
        dtype, heads = r.dtype, B * H
        masks = chunk_masks(segment_ids, CHUNK, dtype)
        before, rest, whole = _state_decays(log_decay, masks)
        dy = _flat_chunks(dy, dtype)

        from_y = dy.mT @ (r * before)
        dstates = torch.empty_like(states)  # of the state that leaves a chunk
        dlast = dstate.reshape(heads, N, N).to(dtype)
        for m in reversed(range(0, len(states), heads)):
            chunk = slice(m, m + heads)
            dstates[chunk] = dlast
            dlast = torch.addcmul(from_y[chunk], dlast, whole[chunk])

        dr = (dy @ states).mul_(before)
        dk = (v @ dstates).mul_(rest)
        dv = ((k * rest) @ dstates.mT).baddbmm_(A.mT, dy)
        dlog = _later(r * dr) + _earlier(k * dk)
        dlog += (states * dstates).sum(1, keepdim=True) * whole

        dA = apply_mask(dy @ v.mT, masks.same)
        own = u.to(dtype).repeat(len(r) // H, 1).unsqueeze(1)
        dself = dA.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        du = (dself * r * k).sum(1).view(-1, H, N).sum(0)
        dr += dself * own * k
        dk += dself * own * r
        for level in _levels(log_decay):
            _halves_backward(level, r, k, dA, dr, dk, dlog)

        dw = dlog * log_decay
        shape, (r_dtype, w_dtype) = ctx.shape, ctx.dtypes
        dr, dk, dv = (from_chunks(x, shape, r_dtype) for x in (dr, dk, dv))
        dinitial = None
        if ctx.initial_dtype is not None:
            dinitial = dlast.reshape(dstate.shape).to(ctx.initial_dtype)
        return dr, from_chunks(dw, shape, w_dtype), dk, dv, du.to(u.dtype), dinitial, None


def _halves_backward(
    level: _Halves, r: Tensor, k: Tensor, dA: Tensor, dr: Tensor, dk: Tensor, dlog: Tensor
) -> None:
    """Adds what one level of A gives to the gradients of r, k and the log decays."""
    size = level.size
    early_k, late_r = _early(k, size), _late(r, size)
    block = _blocks(dA, size).permute(0, 3, 1, 2)
    dlate = (block @ (early_k * level.to_border)).mul_(level.from_border)
    dearly = (block.mT @ (late_r * level.from_border)).mul_(level.to_border)
    _late(dr, size).add_(dlate)
    _early(dk, size).add_(dearly)
    # an early token's key passes the decays after it up to the border, a late token's r those
    # from the border up to the one before it
    _early(dlog, size).add_(_earlier(early_k * dearly))
    _late(dlog, size).add_(_later(late_r * dlate))
