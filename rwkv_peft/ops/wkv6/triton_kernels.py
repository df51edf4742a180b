"""The stages of WKV-6 as Triton kernels; `chunked` has the formulas.

A program carries the state that meets its chunk over slabs of 16 tokens, which alone have products
of tokens with each other. The scan over the chunks is that of `ops.triton_kernels`.

At level l a slab falls into pairs of an early and a late half of 2^l tokens, and what a late token
sees of an early one is measured from the border between them: a factor of at most one for either.
Two tokens are in the two halves of one pair at one level alone, that of the highest bit in which
their numbers differ. Sums, of log decays and of what their gradients are made of, are products with
masks: each has the terms that belong to it and no others, so that nothing has to cancel.

Triton distributes the warps of all products of a region along the longer side of the last product.
That must be (SLAB, N) here: with (SLAB, SLAB) every warp would compute everything.
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
    store,
    tile,
)
from rwkv_peft.ops.wkv6.chunked import MAX_LOGIT as _MAX_LOGIT

MAX_LOGIT = tl.constexpr(_MAX_LOGIT)
SLAB, LEVELS = tl.constexpr(16), tl.constexpr(4)


@triton.jit
def log_decays(w, exists, OPERAND: tl.constexpr):
    """Log decays in base 2; zero for tokens that do not exist, which leave the state as it is."""
    rate = power(tl.where(w > MAX_LOGIT, MAX_LOGIT, w) * LOG2_E, OPERAND)
    return tl.where(exists, rate * -LOG2_E, 0.0)


@triton.jit
def pair():
    """Numbers of tokens, down and across (SLAB, SLAB)."""
    t = tl.arange(0, SLAB)
    return t[:, None], t[None, :]


@triton.jit
def border(level):
    """Two masks (SLAB, SLAB) of a level: pairs of tokens, and what lies between them.

    The first marks a late token and an early one of its pair of halves; the second marks, for each
    token, those between it and the border of its pair.
    """
    t, i = pair()
    is_late = t >> level & 1 == 1
    meet = ((t ^ i) >> level == 1) & is_late
    return meet, ((t ^ i) >> level == 0) & tl.where(is_late, i < t, i > t)


@triton.jit
def total(mask, x, PRECISION: tl.constexpr):
    """For each row of a mask, the sum over its tokens."""
    return tl.dot(mask.to(tl.float32), x, input_precision=PRECISION)


@triton.jit
def advance(
    S, w, keys, values, segment_ids, batch, slab, head, T, H,
    N: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a slab, or in REVERSE its gradient before the slab; and the slab's decay."""
    token = ((batch * T + slab * SLAB) * H + head) * N
    offsets, exists = tile(token, T - slab * SLAB, H, SLAB, N)
    _, enters, leaves, carried = document_masks(segment_ids, batch, slab, T, SLAB, SEGMENTS)
    log = log_decays(load(w, offsets, exists), exists, OPERAND)
    t, i = pair()
    rest = total(i < t if REVERSE else i > t, log, PRECISION)
    k = load(keys, offsets, exists) * power(rest, OPERAND)
    k = tl.where(enters if REVERSE else leaves, k, 0.0)
    left = power(tl.sum(log, 0), OPERAND) * carried
    added = dot(tl.trans(load(values, offsets, exists)), k, OPERAND, PRECISION)
    return S * left[None, :] + added, left


@triton.jit(do_not_specialize=NUMBERS)
def chunk(
    w, keys, values, segment_ids,
    added, decay,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, c, _, number = locate(T, H, M, C, N)
    S, left = tl.zeros((N, N), tl.float32), tl.full((N,), 1.0, tl.float32)
    for i in range(C // SLAB):
        slab = c * (C // SLAB) + i
        if REVERSE:
            slab = (c + 1) * (C // SLAB) - 1 - i
        S, own = advance(
            S, w, keys, values, segment_ids, batch, slab, number // M % H, T, H,
            N, SEGMENTS, REVERSE, OPERAND, PRECISION,
        )  # fmt: skip
        left *= own
    tl.store(added + number * N * N + matrix(N, N), S.to(added.dtype.element_ty))
    tl.store(decay + number * N + tl.arange(0, N), left)


@triton.jit
def state_at(
    states, w, keys, values, segment_ids, batch, slab, head, number, T, H,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before a slab, or in REVERSE its gradient after it, from the state of its chunk."""
    SLABS: tl.constexpr = C // SLAB
    S = tl.load(states + number // SLABS * N * N + matrix(N, N)).to(tl.float32)
    first = slab // SLABS * SLABS
    if REVERSE:
        for later in range(first + SLABS - 1, slab, -1):
            S, _ = advance(
                S, w, keys, values, segment_ids, batch, later, head, T, H,
                N, SEGMENTS, REVERSE, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        for earlier in range(first, slab):
            S, _ = advance(
                S, w, keys, values, segment_ids, batch, earlier, head, T, H,
                N, SEGMENTS, REVERSE, OPERAND, PRECISION,
            )  # fmt: skip
    return S.to(OPERAND)


@triton.jit(do_not_specialize=NUMBERS)
def output(
    r, w, k, v, u, segment_ids, states,
    y,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SLABS: tl.constexpr = C // SLAB
    batch, slab, token, number = locate(T, H, M * SLABS, SLAB, N)
    head = number // (M * SLABS) % H
    S = state_at(
        states, w, k, v, segment_ids, batch, slab, head, number, T, H,
        C, N, SEGMENTS, False, OPERAND, PRECISION,
    )  # fmt: skip

    offsets, exists = tile(token, T - slab * SLAB, H, SLAB, N)
    same, enters, _, _ = document_masks(segment_ids, batch, slab, T, SLAB, SEGMENTS)
    log = log_decays(load(w, offsets, exists), exists, OPERAND)
    rt, kt, values = load(r, offsets, exists), load(k, offsets, exists), load(v, offsets, exists)
    t, i = pair()
    before = power(total(i < t, log, PRECISION), OPERAND)
    out = dot(tl.where(enters, rt * before, 0.0), tl.trans(S), OPERAND, PRECISION)
    for level in range(LEVELS):
        meet, between = border(level)
        factor = power(total(between, log, PRECISION), OPERAND)
        pairs = dot(rt * factor, tl.trans(kt * factor), OPERAND, PRECISION)
        out += dot(tl.where(meet & same, pairs, 0.0), values, OPERAND, PRECISION)
    own = tl.load(u + head * N + tl.arange(0, N))[None, :]
    store(y, offsets, out + tl.sum(rt * own * kt, 1)[:, None] * values, exists)


@triton.jit(do_not_specialize=NUMBERS)
def gradients(
    r, w, k, v, u, segment_ids, states, dstates, dy,
    dr, dw, dk, dv, du,
    T, H, M,
    C: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SLABS: tl.constexpr = C // SLAB
    batch, slab, token, number = locate(T, H, M * SLABS, SLAB, N)
    head = number // (M * SLABS) % H
    S = state_at(
        states, w, k, v, segment_ids, batch, slab, head, number, T, H,
        C, N, SEGMENTS, False, OPERAND, PRECISION,
    )  # fmt: skip
    D = state_at(
        dstates, w, r, dy, segment_ids, batch, slab, head, number, T, H,
        C, N, SEGMENTS, True, OPERAND, PRECISION,
    )  # fmt: skip

    offsets, exists = tile(token, T - slab * SLAB, H, SLAB, N)
    same, enters, leaves, carried = document_masks(segment_ids, batch, slab, T, SLAB, SEGMENTS)
    log = log_decays(load(w, offsets, exists), exists, OPERAND)
    rt, kt = load(r, offsets, exists), load(k, offsets, exists)
    values, d_y = load(v, offsets, exists), load(dy, offsets, exists)
    own = tl.load(u + head * N + tl.arange(0, N))[None, :]
    dvalues = tl.sum(rt * own * kt, 1)[:, None] * d_y
    t, i = pair()
    before = power(total(i < t, log, PRECISION), OPERAND)
    after = power(total(i > t, log, PRECISION), OPERAND)
    dA = dot(d_y, tl.trans(values), OPERAND, PRECISION)
    dreader = tl.where(enters, dot(d_y, S, OPERAND, PRECISION) * before, 0.0)
    dwriter = tl.where(leaves, dot(values, D, OPERAND, PRECISION) * after, 0.0)
    dvalues += dot(tl.where(leaves, kt * after, 0.0), tl.trans(D), OPERAND, PRECISION)
    # a decay scales what the state keeps, what later tokens read of the state or of earlier tokens,
    # and what the leaving state has of those tokens
    kept = power(tl.sum(log, 0), OPERAND) * carried
    dlog = (tl.sum(S.to(tl.float32) * D.to(tl.float32), 0) * kept)[None, :]
    dlog += total(i > t, rt * dreader, PRECISION) + total(i < t, kt * dwriter, PRECISION)

    for level in range(LEVELS):
        meet, between = border(level)
        factor = power(total(between, log, PRECISION), OPERAND)
        r_, k_ = (rt * factor).to(OPERAND), (kt * factor).to(OPERAND)
        pairs = tl.where(meet & same, dot(r_, tl.trans(k_), OPERAND, PRECISION), 0.0)
        dvalues += dot(tl.trans(pairs), d_y, OPERAND, PRECISION)
        dpairs = tl.where(meet & same, dA, 0.0).to(OPERAND)
        dlate = dot(dpairs, k_, OPERAND, PRECISION) * factor
        dearly = dot(tl.trans(dpairs), r_, OPERAND, PRECISION) * factor
        dlog += total(tl.trans(between), rt * dlate + kt * dearly, PRECISION)
        dreader += dlate
        dwriter += dearly

    store(dv, offsets, dvalues, exists)
    store(dw, offsets, dlog * log / LOG2_E, exists)
    dself = tl.sum(d_y * values, 1)[:, None]
    store(dr, offsets, dreader + dself * own * kt, exists)
    store(dk, offsets, dwriter + dself * own * rt, exists)
    tl.store(du + number * N + tl.arange(0, N), tl.sum(dself * rt * kt, 0))
