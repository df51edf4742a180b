"""What the Triton kernels of all operators are built of, and the scan over the states.

A program computes one chunk of one head, or a part of it; a program of the scan computes a slice of
rows of one head's state. Operands of products have the dtype OPERAND; sums, exponents and all else
are float32. Exponents are in base 2.
"""

import triton
import triton.language as tl

BF16, FP32 = tl.bfloat16, tl.float32
# Triton must not specialise on these: one compiled kernel serves all of their values
NUMBERS = ("T", "H", "M")
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(x, y, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    if OPERAND == tl.float32:  # noqa: SIM300
        # The factors, which are exact, keep the compiler from adding the terms of the product to a
        # larger sum one by one: the product is summed by itself and rounded at its own size.
        return tl.dot(x.to(OPERAND) * 2.0, y.to(OPERAND), input_precision=PRECISION) * 0.5
    return tl.dot(x.to(OPERAND), y.to(OPERAND), input_precision=PRECISION)


@triton.jit
def power(x, OPERAND: tl.constexpr):
    """2^x; with float32 operands exact to the last digit, which the hardware unit is not."""
    if OPERAND == tl.float32:  # noqa: SIM300
        n = tl.floor(x + 0.5)
        f = (x - n) * 0.6931471805599453
        p = 1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040)))
        p = 1 + f * (1 / 2 + f * (1 / 6 + f * p))
        exponent = (tl.maximum(n, -127.0) + 127).to(tl.int32)  # of -127 comes zero
        return (1 + f * p) * (exponent << 23).to(tl.float32, bitcast=True)
    return tl.exp2(x)


@triton.jit
def reciprocal(x, OPERAND: tl.constexpr):
    """1 / x; with float32 operands exact to the last digit."""
    return tl.div_rn(1.0, x) if OPERAND == tl.float32 else 1 / x  # noqa: SIM300


@triton.jit
def locate(T, H, M, C: tl.constexpr, N: tl.constexpr):
    """This program's row, chunk in the row, first token's offset, and chunk in (B, H, M)."""
    program = tl.program_id(0).to(tl.int64)
    h, chunk = program % H, program // H
    c, batch = chunk % M, chunk // M
    return batch, c, ((batch * T + c * C) * H + h) * N, (batch * H + h) * M + c


@triton.jit
def tile(token, left, H, C: tl.constexpr, N: tl.constexpr):
    """Offsets of (C, N) in (B, T, H, N), and a mask of its first `left` tokens, which exist."""
    t, n = tl.arange(0, C), tl.arange(0, N)
    offsets = token + t[:, None].to(tl.int64) * H * N + n[None, :]
    return offsets, (t < left)[:, None] & (n >= 0)[None, :]


@triton.jit
def load(x, offsets, exists):
    return tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def scale(x, offsets, exists, exponent, OPERAND: tl.constexpr):
    return load(x, offsets, exists) * power(exponent, OPERAND)


@triton.jit
def store(x, offsets, value, exists):
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def matrix(R: tl.constexpr, N: tl.constexpr):
    return tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def document_masks(segment_ids, batch, c, T, C: tl.constexpr, SEGMENTS: tl.constexpr):
    """Masks of the documents of a chunk: same, enters, leaves, carried.

    same (C, C) marks two tokens of one document; enters and leaves (C, 1) mark the tokens of the
    document of the entering and of the leaving state; carried is 1 if that is one document.
    """
    t = tl.arange(0, C)
    enters, leaves, carried = (t >= 0)[:, None], (t >= 0)[:, None], 1.0
    same = enters & (t >= 0)[None, :]
    if SEGMENTS:
        row = segment_ids + batch * T
        begin = c * C
        ids = tl.load(row + tl.minimum(begin + t, T - 1))
        before = tl.load(row + tl.minimum(tl.maximum(begin - 1, 0), T - 1))
        last = tl.load(row + tl.minimum(begin + C, T) - 1)
        same = ids[:, None] == ids[None, :]
        enters, leaves = (ids == before)[:, None], (ids == last)[:, None]
        carried = tl.where(before == last, 1.0, 0.0)
    return same, enters, leaves, carried


@triton.jit(do_not_specialize=NUMBERS)
def scan(
    transition, added, decay, start, states, end,
    M,
    N: tl.constexpr, ROWS: tl.constexpr, TRANSITION: tl.constexpr, START: tl.constexpr,
    REVERSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The states that meet the chunks, S <- S (diag(decay) + X) + P, in order or in reverse.

    Without TRANSITION there is no X; in reverse X is transposed.
    """
    head = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    rows = tl.program_id(1) * ROWS * N + matrix(ROWS, N)
    S = tl.load(start + head * N * N + rows) if START else tl.zeros((ROWS, N), dtype=tl.float32)
    for i in tl.range(M, num_stages=STAGES):
        chunk = head * M + i
        if REVERSE:
            chunk = head * M + (M - 1 - i)
        P = tl.load(added + chunk * N * N + rows).to(tl.float32)
        d = tl.load(decay + chunk * N + n)
        tl.store(states + chunk * N * N + rows, S.to(states.dtype.element_ty))
        P += S * d[None, :]
        if TRANSITION:
            X = tl.load(transition + chunk * N * N + matrix(N, N)).to(OPERAND)
            if REVERSE:
                X = tl.trans(X)
            P += dot(S, X, OPERAND, PRECISION)
        S = P
    tl.store(end + head * N * N + rows, S)
