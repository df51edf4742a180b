"""The six stages of WKV-7 as Triton kernels; `stages` has their formulas.

The scan over the states is that of `ops.triton_kernels`.
"""

import triton
import triton.language as tl

from rwkv_peft.ops.triton_kernels import (
    LOG2_E,
    NUMBERS,
    document_masks,
    dot,
    load,
    locate,
    matrix,
    power,
    reciprocal,
    scale,
    store,
    tile,
)
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE

BLOCK = tl.constexpr(16)  # the inverse is made by substitution in blocks of this size
SCALE = tl.constexpr(DECAY_SCALE)


@triton.jit
def decays(w, exists, C: tl.constexpr, OPERAND: tl.constexpr):
    """g_t - m, g_{t-1} - m, the sums of log decays of the first and the second half, dl/dw."""
    # the smaller of sigmoid(w) and sigmoid(-w) keeps its digits
    e = power(tl.minimum(w, -w) * LOG2_E, OPERAND)
    gate = reciprocal(1 + e, OPERAND)
    slope = gate * gate * e * -SCALE
    log_decay = tl.where(exists, tl.where(w < 0, gate * e, gate) * (-SCALE * LOG2_E), 0.0)
    t = tl.arange(0, C)[:, None]
    middle = tl.sum(tl.where(t < C // 2, log_decay, 0.0), 0)
    rest = tl.sum(tl.where(t < C // 2, 0.0, log_decay), 0)
    # the middle is subtracted before the sum: afterwards the rounding of larger sums would stay
    g = tl.cumsum(log_decay - tl.where(t == 0, middle[None, :], 0.0), 0)
    return g, g - log_decay, middle, rest, slope


@triton.jit
def inverse_of(A, C: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 of a strictly lower triangular A."""
    K: tl.constexpr = C // BLOCK
    i, j = tl.arange(0, K), tl.arange(0, BLOCK)
    same = i[:, None, None, None] == i[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(A, (K, BLOCK, K, BLOCK)), 0.0), 2)
    row, column = j[None, :, None], j[None, None, :]
    X = tl.where((row == column) & (i >= 0)[:, None, None], 1.0, 0.0)
    for pivot in tl.static_range(BLOCK - 1):
        factors = tl.sum(tl.where(column == pivot, blocks, 0.0), 2)
        solved = tl.sum(tl.where(row == pivot, X, 0.0), 1)
        X += factors[:, :, None] * solved[:, None, :]
    L = tl.reshape(tl.where(same, X[:, :, None, :], 0.0), (C, C))
    # X_21 = X_22 A_21 X_11, for all pairs of blocks at once
    t = tl.arange(0, C)
    if C >= 32:
        L += dot(dot(L, below(A, t, 16), OPERAND, PRECISION), L, OPERAND, PRECISION)
    if C >= 64:
        L += dot(dot(L, below(A, t, 32), OPERAND, PRECISION), L, OPERAND, PRECISION)
    return L


@triton.jit
def below(A, t, size: tl.constexpr):
    """A where a row of an odd block meets a column of the even block before it."""
    block = t // size
    return tl.where((block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1), A, 0.0)


@triton.jit
def causal_masks(same, C: tl.constexpr):
    """Masks (C, C) of the tokens before each in its document, without and with the token itself."""
    t = tl.arange(0, C)
    return same & (t[None, :] < t[:, None]), same & (t[None, :] <= t[:, None])


@triton.jit
def state_transition(W, b_out, middle, rest, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """X, the transition of a chunk."""
    X = dot(tl.trans(W), b_out, OPERAND, PRECISION)
    return X * power(middle, OPERAND)[:, None] * power(rest, OPERAND)[None, :]


@triton.jit
def state_readout(
    rt, bt, W, causal, enters, middle, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """A_rb, and R, with which the outputs read the entering state."""
    A_rb = tl.where(causal, dot(rt, tl.trans(bt), OPERAND, PRECISION), 0.0).to(OPERAND)
    R = tl.where(enters, rt, 0.0) + dot(A_rb, W, OPERAND, PRECISION)
    return A_rb, R * power(middle, OPERAND)[None, :]


@triton.jit(do_not_specialize=NUMBERS)
def chunk_forward(
    r, w, k, v, a, b, segment_ids,
    y, transition, added, decay, readout, inverse,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr, KEEP: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, c, token, chunk = locate(T, H, M, C, N)
    offsets, exists = tile(token, T - c * C, H, C, N)
    same, enters, leaves, carried = document_masks(segment_ids, batch, c, T, C, SEGMENTS)
    strict, causal = causal_masks(same, C)
    g, before, middle, rest, _ = decays(load(w, offsets, exists), exists, C, OPERAND)

    at = scale(a, offsets, exists, before, OPERAND)
    bt = scale(b, offsets, exists, -g, OPERAND).to(OPERAND)
    A_ab = tl.where(strict, dot(at, tl.trans(bt), OPERAND, PRECISION), 0.0)
    L = inverse_of(A_ab, C, OPERAND, PRECISION).to(OPERAND)
    if KEEP:
        tl.store(inverse + chunk * C * C + matrix(C, C), L.to(inverse.dtype.element_ty))
    W = dot(L, tl.where(enters, at, 0.0), OPERAND, PRECISION).to(OPERAND)
    bt_out = tl.where(leaves, bt, 0.0)
    square = chunk * N * N + matrix(N, N)
    X = state_transition(W, bt_out, middle, rest, OPERAND, PRECISION)
    tl.store(transition + square, X.to(transition.dtype.element_ty))
    tl.store(decay + chunk * N + tl.arange(0, N), power(middle + rest, OPERAND) * carried)

    rt = scale(r, offsets, exists, g, OPERAND)
    A_rb, R = state_readout(rt, bt, W, causal, enters, middle, OPERAND, PRECISION)
    tl.store(readout + chunk * C * N + matrix(C, N), R.to(readout.dtype.element_ty))

    kt = scale(k, offsets, exists, -g, OPERAND).to(OPERAND)
    values = load(v, offsets, exists).to(OPERAND)
    A_ak = tl.where(strict, dot(at, tl.trans(kt), OPERAND, PRECISION), 0.0)
    u = dot(L, dot(A_ak, values, OPERAND, PRECISION), OPERAND, PRECISION).to(OPERAND)
    A_rk = tl.where(causal, dot(rt, tl.trans(kt), OPERAND, PRECISION), 0.0)
    out = dot(A_rk, values, OPERAND, PRECISION) + dot(A_rb, u, OPERAND, PRECISION)
    store(y, offsets, out, exists)
    P = dot(tl.trans(values), tl.where(leaves, kt, 0.0), OPERAND, PRECISION)
    P = (P + dot(tl.trans(u), bt_out, OPERAND, PRECISION)) * power(rest, OPERAND)[None, :]
    tl.store(added + square, P.to(added.dtype.element_ty))


@triton.jit(do_not_specialize=NUMBERS)
def output(
    readout, states, y,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, c, token, chunk = locate(T, H, M, C, N)
    offsets, exists = tile(token, T - c * C, H, C, N)
    R = tl.load(readout + chunk * C * N + matrix(C, N)).to(OPERAND)
    S = tl.load(states + chunk * N * N + matrix(N, N)).to(OPERAND)
    out = load(y, offsets, exists) + dot(R, tl.trans(S), OPERAND, PRECISION)
    store(y, offsets, out, exists)


@triton.jit(do_not_specialize=NUMBERS)
def chunk_backward(
    r, w, a, b, segment_ids, inverse, dy,
    transition, added, decay,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, c, token, chunk = locate(T, H, M, C, N)
    offsets, exists = tile(token, T - c * C, H, C, N)
    same, enters, leaves, carried = document_masks(segment_ids, batch, c, T, C, SEGMENTS)
    _, causal = causal_masks(same, C)
    g, before, middle, rest, _ = decays(load(w, offsets, exists), exists, C, OPERAND)

    at = scale(a, offsets, exists, before, OPERAND)
    bt = scale(b, offsets, exists, -g, OPERAND).to(OPERAND)
    L = tl.load(inverse + chunk * C * C + matrix(C, C)).to(OPERAND)
    W = dot(L, tl.where(enters, at, 0.0), OPERAND, PRECISION).to(OPERAND)
    square = chunk * N * N + matrix(N, N)
    X = state_transition(W, tl.where(leaves, bt, 0.0), middle, rest, OPERAND, PRECISION)
    tl.store(transition + square, X.to(transition.dtype.element_ty))
    tl.store(decay + chunk * N + tl.arange(0, N), power(middle + rest, OPERAND) * carried)

    rt = scale(r, offsets, exists, g, OPERAND)
    _, R = state_readout(rt, bt, W, causal, enters, middle, OPERAND, PRECISION)
    d_y = load(dy, offsets, exists).to(OPERAND)
    Q = dot(tl.trans(d_y), R, OPERAND, PRECISION)
    tl.store(added + square, Q.to(added.dtype.element_ty))


@triton.jit
def solve(
    L, at, bt, A_ak, A_rb, v, dy, S, D, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """u, what the tokens take out of the state, and z, the gradient of the system's right side."""
    u = dot(at, tl.trans(S), OPERAND, PRECISION) + dot(A_ak, v, OPERAND, PRECISION)
    du = dot(bt, tl.trans(D), OPERAND, PRECISION) + dot(tl.trans(A_rb), dy, OPERAND, PRECISION)
    u = dot(L, u, OPERAND, PRECISION).to(OPERAND)
    return u, dot(tl.trans(L), du, OPERAND, PRECISION).to(OPERAND)


@triton.jit
def reader_gradient(
    d_y, S, enters, dA_k, k, dA_b, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradient of rt or at, which read the state and the tokens before."""
    grad = tl.where(enters, dot(d_y, S, OPERAND, PRECISION), 0.0)
    return grad + dot(dA_k, k, OPERAND, PRECISION) + dot(dA_b, b, OPERAND, PRECISION)


@triton.jit
def writer_gradient(
    value, D, leaves, dA_r, r, dA_a, a, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradient of kt or bt, which the state and later tokens read; the state's part of it."""
    grad = dot(tl.trans(dA_r), r, OPERAND, PRECISION) + dot(tl.trans(dA_a), a, OPERAND, PRECISION)
    leaving = tl.where(leaves, dot(value, D, OPERAND, PRECISION), 0.0)
    return grad + leaving, leaving


@triton.jit(do_not_specialize=NUMBERS)
def gradients(
    r, w, k, v, a, b, segment_ids, inverse, states, dstates, dy,
    dr, dw, dk, dv, da, db,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, c, token, chunk = locate(T, H, M, C, N)
    offsets, exists = tile(token, T - c * C, H, C, N)
    same, enters, leaves, carried = document_masks(segment_ids, batch, c, T, C, SEGMENTS)
    strict, causal = causal_masks(same, C)
    g, before, middle, rest, slope = decays(load(w, offsets, exists), exists, C, OPERAND)

    at, rt = scale(a, offsets, exists, before, OPERAND), scale(r, offsets, exists, g, OPERAND)
    bt, kt = scale(b, offsets, exists, -g, OPERAND), scale(k, offsets, exists, -g, OPERAND)
    a_, b_, r_, k_ = at.to(OPERAND), bt.to(OPERAND), rt.to(OPERAND), kt.to(OPERAND)
    values, d_y = load(v, offsets, exists).to(OPERAND), load(dy, offsets, exists).to(OPERAND)
    square = chunk * N * N + matrix(N, N)
    S = tl.load(states + square).to(tl.float32) * power(middle, OPERAND)[None, :]
    D = tl.load(dstates + square).to(tl.float32) * power(rest, OPERAND)[None, :]
    dlog_all = tl.sum(S * D, 0) * carried
    S, D = S.to(OPERAND), D.to(OPERAND)

    A_ak = tl.where(strict, dot(a_, tl.trans(k_), OPERAND, PRECISION), 0.0).to(OPERAND)
    A_rb = tl.where(causal, dot(r_, tl.trans(b_), OPERAND, PRECISION), 0.0).to(OPERAND)
    a_in, b_out = tl.where(enters, a_, 0.0), tl.where(leaves, b_, 0.0)
    L = tl.load(inverse + chunk * C * C + matrix(C, C)).to(OPERAND)
    u, z = solve(L, a_in, b_out, A_ak, A_rb, values, d_y, S, D, OPERAND, PRECISION)

    A_rk = tl.where(causal, dot(r_, tl.trans(k_), OPERAND, PRECISION), 0.0)
    grad = tl.where(leaves, dot(k_, tl.trans(D), OPERAND, PRECISION), 0.0)
    grad += dot(tl.trans(A_rk), d_y, OPERAND, PRECISION)
    grad += dot(tl.trans(A_ak), z, OPERAND, PRECISION)
    store(dv, offsets, grad, exists)

    # the decay of token t scales all that passes it: `later` sums over the tokens from t on
    dA_rk = tl.where(causal, dot(d_y, tl.trans(values), OPERAND, PRECISION), 0.0).to(OPERAND)
    dA_rb = tl.where(causal, dot(d_y, tl.trans(u), OPERAND, PRECISION), 0.0).to(OPERAND)
    grad = reader_gradient(d_y, S, enters, dA_rk, k_, dA_rb, b_, OPERAND, PRECISION)
    store(dr, offsets, grad * power(g, OPERAND), exists)
    later = rt * grad
    dA_ak = tl.where(strict, dot(z, tl.trans(values), OPERAND, PRECISION), 0.0).to(OPERAND)
    dA_ab = tl.where(strict, dot(z, tl.trans(u), OPERAND, PRECISION), 0.0).to(OPERAND)
    grad = reader_gradient(z, S, enters, dA_ak, k_, dA_ab, b_, OPERAND, PRECISION)
    store(da, offsets, grad * power(before, OPERAND), exists)
    own = at * grad
    later += own

    grad, leaving = writer_gradient(values, D, leaves, dA_rk, r_, dA_ak, a_, OPERAND, PRECISION)
    store(dk, offsets, grad * power(-g, OPERAND), exists)
    later -= kt * grad
    dlog_all += tl.sum(kt * leaving, 0)
    grad, leaving = writer_gradient(u, D, leaves, dA_rb, r_, dA_ab, a_, OPERAND, PRECISION)
    store(db, offsets, grad * power(-g, OPERAND), exists)
    later -= bt * grad
    dlog_all += tl.sum(bt * leaving, 0)

    later = tl.cumsum(later, 0, reverse=True) - own + dlog_all[None, :]
    store(dw, offsets, later * slope, exists)
