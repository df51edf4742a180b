"""One step of AdamW as a Triton kernel, which reads and writes each number once."""

import triton
import triton.language as tl


@triton.jit
def _one_minus_exp(x):
    """1 - e^x for x <= 0; near 0 by its series, as the difference has few digits there."""
    series = 1.0
    for i in tl.static_range(10, 1, -1):
        series = 1 + series * x / i
    return -tl.where(x > -0.5, x * series, tl.exp(x) - 1)


@triton.jit(do_not_specialize=("count",))
def step(
    high,
    low,
    gradient,
    mean,
    square,
    taken,
    factor,
    skips,
    count,
    lr,
    decay,
    beta1,
    rest1,
    log1,
    beta2,
    rest2,
    log2,
    eps,
    HAS_FACTOR: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """high, low (count,) int16: the halves of float32 values, see `halves`.

    taken () counts the steps, this one among them; lr times the decay is `decay`, `rest` is
    1 - beta and `log` its logarithm. With `skips` () not 0 all stays as it is.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if MAY_SKIP:
        count = tl.where(tl.load(skips) == 0, count, 0)
    exists = at < count
    upper = tl.load(high + at, exists, 0).to(tl.int32) << 16
    x = (upper + tl.load(low + at, exists, 0).to(tl.int32)).to(tl.float32, bitcast=True)
    g = tl.load(gradient + at, exists, 0).to(tl.float32)
    if HAS_FACTOR:
        g *= tl.load(factor)
    m = beta1 * tl.load(mean + at, exists, 0) + rest1 * g
    v = beta2 * tl.load(square + at, exists, 0) + rest2 * g * g

    number = tl.load(taken)
    rate = lr / _one_minus_exp(number * log1)
    root = tl.sqrt_rn(_one_minus_exp(number * log2))
    x -= decay * x
    x -= rate * m / (tl.sqrt_rn(v) / root + eps)

    bits = x.to(tl.int32, bitcast=True)
    tl.store(mean + at, m, exists)
    tl.store(square + at, v, exists)
    tl.store(low + at, bits.to(tl.int16), exists)
    tl.store(high + at, ((bits + 0x8000) >> 16).to(tl.int16), exists)
