"""WKV-7 in chunks of time: matrix products inside a chunk, a short scan of states between chunks.

Inside a chunk the state is written as S_t = E_t diag(D_t), with D_t the decay accumulated since the
chunk began. The decay then leaves the recurrence and moves into the operands, two rows a token:

    P = [a_t D_{t-1}; r_t D_t],   Q = [b_t / D_t; k_t / D_t],   A = P Q^T, causally masked.

With u_t = S_{t-1} a_t, the vector that token t takes out of the state, and X = [u; v], a chunk is

    u = (I - A_ab)^-1 (P_a S_0^T + A_ak v)
    y = P_r S_0^T + A_r X
    S_C = S_0 diag(D_C) + X^T Q diag(D_C).

Only u and S_C are sequential, from chunk to chunk. RWKV-7 decays lie in (0.545, 1), so that D_t of
32 tokens stays above 3e-9 and nothing leaves the range of float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.chunking import from_chunks, to_chunks
from rwkv_peft.ops.opaque import opaque
from rwkv_peft.ops.segments import Masks, apply_mask, chunk_masks
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE

CHUNK = 32


@opaque
def wkv7_chunked(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence by chunks of 32 tokens in plain PyTorch, with a backward of its own.

    Same arguments and results as `wkv7_reference`, on any device.
    """
    y, state = _ChunkedWkv7.apply(r, w, k, v, a, b, initial_state, segment_ids)
    return y, state


class _Operands(NamedTuple):
    """The operands of one call as n = M*B*H matrices, the M chunks of C = 32 tokens first."""

    p: Tensor  # (n, 2C, N): rows of a, then rows of r
    q: Tensor  # (n, 2C, N): rows of b, then rows of k
    decayed: Tensor  # (n, C, N): D_t
    dlog_dw: Tensor  # (n, C, N): derivative of the log decay by w


def _operands(
    r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype
) -> _Operands:
    # padding tokens have decay 1 (logit -inf) and zero k, b: they leave the state as it is
    gate = torch.sigmoid(to_chunks(w, CHUNK, fill=-torch.inf).to(dtype).contiguous())
    log_decay = gate * -DECAY_SCALE
    decayed = torch.exp(log_decay).cumprod(3)
    M, B, H, C, N = decayed.shape
    p, q = decayed.new_empty(2, M, B, H, 2, C, N)
    a = to_chunks(a, CHUNK)
    p[..., 0, :1, :] = a[..., :1, :]
    torch.mul(a[..., 1:, :], decayed[..., :-1, :], out=p[..., 0, 1:, :])
    torch.mul(to_chunks(r, CHUNK), decayed, out=p[..., 1, :, :])
    torch.div(to_chunks(b, CHUNK), decayed, out=q[..., 0, :, :])
    torch.div(to_chunks(k, CHUNK), decayed, out=q[..., 1, :, :])
    return _Operands(
        p=p.view(-1, 2 * C, N),
        q=q.view(-1, 2 * C, N),
        decayed=decayed.view(-1, C, N),
        dlog_dw=log_decay.mul_(gate.neg_().add_(1)).view(-1, C, N),
    )


def _mask_pairs(products: Tensor, masks: Masks) -> Tensor:
    """Zeroes, in place, the products (n, 2C, 2C) of tokens that do not see each other.

    A row of `a` sees the tokens before its own, a row of `r` its own as well, both only within
    their document.
    """
    ones = torch.ones(CHUNK, CHUNK, dtype=products.dtype, device=products.device)
    causal = torch.cat((ones.tril(-1).repeat(1, 2), ones.tril().repeat(1, 2)))
    if masks.same is None:
        return products.mul_(causal)
    products.unflatten(0, (*masks.same.shape[:2], -1)).mul_(causal * masks.same)
    return products


def _mask_for_states(x: _Operands, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """P for the entering state, Q for the leaving state, the decay between; masked by documents.

    (n, 2C, N), (n, 2C, N), (n, 1, N).
    """
    whole = x.decayed[:, -1:]
    return (
        apply_mask(x.p, masks.enters),
        apply_mask(x.q * whole, masks.leaves),
        apply_mask(whole, masks.carried),
    )


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I - strict)^-1 for strictly lower triangular (n, C, C), C a power of two, by halves.

    As stable as substitution, and faster than solve_triangular, being batched products.
    """
    C = strict.shape[-1]
    if C == 2:
        return torch.eye(C, dtype=strict.dtype, device=strict.device) + strict
    h = C // 2
    halves = torch.cat((strict[:, :h, :h], strict[:, h:, h:]))
    first, second = _unit_lower_inverse(halves).chunk(2)
    inverse = torch.zeros_like(strict)
    inverse[:, :h, :h] = first
    inverse[:, h:, h:] = second
    inverse[:, h:, :h] = second @ strict[:, h:, :h].contiguous() @ first
    return inverse


class _ChunkedWkv7(torch.autograd.Function):
    """Keeps the operands, the chunk-start states, u, v and two small matrices a chunk."""

    @staticmethod
    def forward(ctx: Any, r, w, k, v, a, b, initial_state, segment_ids):  # type: ignore[no-untyped-def]
        B, _, H, N = r.shape
        dtype = torch.promote_types(r.dtype, torch.float32)
        x = _operands(r, w, k, a, b, dtype)
        masks = chunk_masks(segment_ids, CHUNK, dtype, rows=2)
        p_in, q_out, kept = _mask_for_states(x, masks)
        seen = _mask_pairs(x.p @ x.q.mT, masks)
        solve = _unit_lower_inverse(seen[:, :CHUNK, :CHUNK])
        from_state = solve @ p_in[:, :CHUNK]
        u_and_v = torch.empty_like(x.p)
        values = u_and_v[:, CHUNK:]
        values.view(-1, B, H, CHUNK, N).copy_(to_chunks(v, CHUNK))
        u = solve @ (seen[:, :CHUNK, CHUNK:] @ values)
        added = values.mT @ q_out[:, CHUNK:]

        states = torch.empty_like(added)
        state = added.new_zeros(B * H, N, N)
        if initial_state is not None:
            state += initial_state.reshape(B * H, N, N)
        for m in range(0, len(states), B * H):
            chunk = slice(m, m + B * H)
            states[chunk] = state
            u[chunk].baddbmm_(from_state[chunk], state.mT)
            state = added[chunk].addcmul_(state, kept[chunk])
            state.baddbmm_(u[chunk].mT, q_out[chunk, :CHUNK])
        state = state.clone()  # a view would keep all of `added` alive
        u_and_v[:, :CHUNK] = u
        y = (p_in[:, CHUNK:] @ states.mT).baddbmm_(seen[:, CHUNK:], u_and_v)

        ctx.save_for_backward(*x, seen, solve, u_and_v, states, state, segment_ids)
        ctx.shape, ctx.dtype = r.shape, r.dtype
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return from_chunks(y, r.shape, r.dtype), state.reshape(B, H, N, N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy, dstate = grads
        *operands, seen, solve, u_and_v, states, last_state, segment_ids = ctx.saved_tensors
        x, heads = _Operands(*operands), len(last_state)
        masks = chunk_masks(segment_ids, CHUNK, x.p.dtype, rows=2)
        p_in, q_out, kept = _mask_for_states(x, masks)
        dz_and_dy = torch.empty_like(x.p)
        dy_chunks = dz_and_dy[:, CHUNK:]
        dy_chunks.view(-1, *ctx.shape[::2], CHUNK, ctx.shape[3]).copy_(to_chunks(dy, CHUNK))

        # dz is the gradient of the right-hand side of the triangular system
        dz = solve.mT @ (seen[:, CHUNK:, :CHUNK].mT @ dy_chunks)
        through_b = solve.mT @ q_out[:, :CHUNK]
        from_y = dy_chunks.mT @ p_in[:, CHUNK:]
        dstates, leaving = torch.empty_like(states), torch.empty_like(kept)
        dlast, end = dstate.reshape(last_state.shape).to(states.dtype), last_state
        for m in reversed(range(0, len(states), heads)):
            chunk = slice(m, m + heads)
            leaving[chunk] = (dlast * end).sum(1, keepdim=True)
            end = states[chunk]
            dstates[chunk] = dlast
            dz[chunk].baddbmm_(through_b[chunk], dlast.mT)
            dlast = from_y[chunk].addcmul_(dlast, kept[chunk])
            dlast.baddbmm_(dz[chunk].mT, p_in[chunk, :CHUNK])
        dz_and_dy[:, :CHUNK] = dz

        dv = (q_out[:, CHUNK:] @ dstates.mT).baddbmm_(seen[:, :, CHUNK:].mT, dz_and_dy)
        del q_out, p_in
        dseen = _mask_pairs(dz_and_dy @ u_and_v.mT, masks)
        dp = apply_mask(dz_and_dy @ states, masks.enters).baddbmm_(dseen, x.q)
        dq = apply_mask((u_and_v @ dstates).mul_(x.decayed[:, -1:]), masks.leaves)
        dq.baddbmm_(dseen.mT, x.p)

        dw = _decay_gradient(x, dp, dq, leaving)
        dp[:, 1:CHUNK] *= x.decayed[:, :-1]
        dp[:, CHUNK:] *= x.decayed
        dq.unflatten(1, (2, CHUNK)).div_(x.decayed.unsqueeze(1))
        found = (dp[:, CHUNK:], dw, dq[:, CHUNK:], dv, dp[:, :CHUNK], dq[:, :CHUNK])
        dinitial = None
        if ctx.initial_dtype is not None:
            dinitial = dlast.reshape(dstate.shape).to(ctx.initial_dtype, copy=True)
        return *(from_chunks(g, ctx.shape, ctx.dtype) for g in found), dinitial, None


def _decay_gradient(x: _Operands, dp: Tensor, dq: Tensor, leaving: Tensor) -> Tensor:
    """Gradient of w: a decay scales all that comes after it in the chunk, and the leaving state."""
    # what a token's own decay scales, and what only the decays before it do
    after = dp[:, CHUNK:] * x.p[:, CHUNK:]
    after.addcmul_(dq[:, :CHUNK], x.q[:, :CHUNK], value=-1)
    after.addcmul_(dq[:, CHUNK:], x.q[:, CHUNK:], value=-1)
    scaled = torch.addcmul(after, dp[:, :CHUNK], x.p[:, :CHUNK])
    later = scaled.cumsum(1)
    return after.sub_(later).add_(later[:, -1:] + leaving).mul_(x.dlog_dw)
