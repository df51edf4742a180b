"""What the Triton kernels of all operators are made of, and the pass over the states.

A program has a chunk of one head, or a part of one; that of the scan a slice of rows of one head's
state. Operands of products have the type OPERAND; sums, exponents and whatever is not an operand
are float32. Exponents are in base 2.
"""

import triton
import triton.language as tl

BF16, FP32 = tl.bfloat16, tl.float32
# one compiled kernel serves all of their values, 1 and multiples of 16 too
NUMBERS = ("T", "H", "M")
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(x, y, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    if OPERAND == tl.float32:  # noqa: SIM300
        # A sum of its own, rounded at its own size: the compiler lets a bare product add to what it
        # is added to, term after term. The factors are exact.
        return tl.dot(x.to(OPERAND) * 2.0, y.to(OPERAND), input_precision=PRECISION) * 0.5
    return tl.dot(x.to(OPERAND), y.to(OPERAND), input_precision=PRECISION)


@triton.jit
def power(x, OPERAND: tl.constexpr):
    """2^x; beside float32 operands to its last digit, which the unit for 2^x does not promise."""
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
    """1 / x; beside float32 operands to its last digit."""
    return tl.div_rn(1.0, x) if OPERAND == tl.float32 else 1 / x  # noqa: SIM300


@triton.jit
def locate(T, H, M, C: tl.constexpr, N: tl.constexpr):
    """This program's batch row, its offset among tokens and its chunk's number in (B, H, M)."""
    program = tl.program_id(0).to(tl.int64)
    h, chunk = program % H, program // H
    c, batch = chunk % M, chunk // M
    return batch, c, ((batch * T + c * C) * H + h) * N, (batch * H + h) * M + c


@triton.jit
def tile(token, left, H, C: tl.constexpr, N: tl.constexpr):
    """Offsets of (C, N) in (B, T, H, N), and which of its tokens exist: `left` are to come."""
    t, n = tl.arange(0, C), tl.arange(0, N)
    offsets = token + t[:, None].to(tl.int64) * H * N + n[None, :]
    return offsets, (t < left)[:, None] & (n >= 0)[None, :]


@triton.jit
def load(x, offsets, exists):
    return tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_scaled(x, offsets, exists, exponent, OPERAND: tl.constexpr):
    return load(x, offsets, exists) * power(exponent, OPERAND)


@triton.jit
def store(x, offsets, value, exists):
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def matrix(R: tl.constexpr, N: tl.constexpr):
    return tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def document_masks(segment_ids, batch, c, T, C: tl.constexpr, SEGMENTS: tl.constexpr):
    """Masks: which two tokens are of one document; tokens of the document of the state that enters,

    of the one that leaves; and whether both states are of one document.
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
    """States that meet the chunks in order, S <- S (diag(decay) + X) + P, without X if there is no

    TRANSITION; or in reverse with X transposed.
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
