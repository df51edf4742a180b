"""Inputs and the error budget that tests and benchmarks of operators share."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.ops import wkv6, wkv7
from rwkv_peft.ops.dispatch import Backend
from rwkv_peft.ops.segments import goes_on
from rwkv_peft.ops.wkv6.chunked import wkv6_chunked
from rwkv_peft.ops.wkv6.reference import wkv6_reference
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_reference

DECAYS = ("trained", "none", "fastest", "mixed", "extreme")
# borders before, on and after the ends of chunks of 16, 32 and 64 tokens, documents of one token,
# and one of several chunks
DOCUMENT_LENGTHS = (7, 1, 24, 32, 1, 63, 64, 5, 155)


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of a recurrence and the gradients of its two results.

    Attributes:
        inputs: by name, in the order of the operator's arguments; (B, T, H, N), and u (H, N).
        initial_state, dstate: (B, H, N, N); no initial state if None.
        dy: (B, T, H, N).
        segment_ids: (B, T) int32; None if rows are not packed.
    """

    inputs: dict[str, Tensor]
    initial_state: Tensor | None
    dy: Tensor
    dstate: Tensor
    segment_ids: Tensor | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Case":
        """The same values in another type; states at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        state, segments = self.initial_state, self.segment_ids
        return Case(
            {name: x.to(device, dtype) for name, x in self.inputs.items()},
            None if state is None else state.to(device, wide),
            self.dy.to(device, dtype),
            self.dstate.to(device, wide),
            None if segments is None else segments.to(device),
        )

    def rows(self, rows: slice, times: slice = slice(None)) -> "Case":
        """Some rows and tokens; u belongs to all."""
        state, segments = self.initial_state, self.segment_ids
        return Case(
            {n: x if n == "u" else x[rows, times] for n, x in self.inputs.items()},
            None if state is None else state[rows],
            self.dy[rows, times],
            self.dstate[rows],
            None if segments is None else segments[rows, times],
        )


def batched(cases: Sequence[Case]) -> Case:
    """One case with the rows of all; u is that of the first."""

    def join(parts: Sequence[Tensor | None]) -> Tensor | None:
        given = [x for x in parts if x is not None]
        return torch.cat(given) if given else None

    first = cases[0]
    return Case(
        {
            n: x if n == "u" else torch.cat([c.inputs[n] for c in cases])
            for n, x in first.inputs.items()
        },
        join([c.initial_state for c in cases]),
        torch.cat([c.dy for c in cases]),
        torch.cat([c.dstate for c in cases]),
        join([c.segment_ids for c in cases]),
    )


class _Draw:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def decay(self, kind: str, shape: tuple[int, ...], mean: float) -> Tensor:
        drawn = self.normal(*shape)
        return {
            "trained": drawn * 1.5 + mean,
            "none": torch.full_like(drawn, -20.0),
            "fastest": torch.full_like(drawn, 20.0),
            "mixed": drawn * 14,
            "extreme": torch.erf(drawn / 2**0.5) * 20,
        }[kind]


def packed_segments(B: int, T: int, seed: int = 0) -> Tensor:
    """Numbers (B, T) int32 of documents of uneven lengths, with other borders in every row."""
    rows = []
    for row in range(seed, seed + B):
        lengths = islice(cycle(DOCUMENT_LENGTHS), row * 4 % 9, row * 4 % 9 + T)
        ends = torch.tensor(list(accumulate(lengths)))
        # numbers need neither begin at zero nor be next to each other
        rows.append(row + 3 * torch.searchsorted(ends, torch.arange(T), right=True))
    return torch.stack(rows).int()


def wkv7_case(
    B: int = 2,
    T: int = 64,
    H: int = 2,
    N: int = 64,
    *,
    decay: str = "trained",
    has_state: bool = True,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Inputs distributed as in a trained model, rounded to `dtype`.

    Args:
        decay: 'trained' logits (mean -1, deviation 1.5), 'none' (-20), 'fastest' (+20), 'mixed'
            (deviation 14), 'extreme' (uniform from -20 to 20).
        packed: rows of several documents, no two alike.
    """
    draw, shape = _Draw(seed), (B, T, H, N)
    r, w = draw.normal(*shape), draw.decay(decay, shape, -1.0)
    kk, rate = F.normalize(draw.normal(*shape), dim=-1), torch.sigmoid(draw.normal(*shape))
    k, v = draw.normal(*shape) * 0.5, draw.normal(*shape)
    state = draw.normal(B, H, N, N) if has_state else None
    inputs = {"r": r, "w": w, "k": k, "v": v, "a": -kk, "b": kk * rate}
    segments = packed_segments(B, T, seed) if packed else None
    return Case(inputs, state, draw.normal(*shape), draw.normal(B, H, N, N), segments).to(dtype)


def wkv6_case(
    B: int = 2,
    T: int = 64,
    H: int = 2,
    N: int = 64,
    *,
    decay: str = "trained",
    has_state: bool = True,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Like `wkv7_case`; 'trained' logits have mean -2."""
    draw, shape = _Draw(seed), (B, T, H, N)
    r, w = draw.normal(*shape), draw.decay(decay, shape, -2.0)
    k, v, u = draw.normal(*shape) * 0.5, draw.normal(*shape), draw.normal(H, N)
    state = draw.normal(B, H, N, N) if has_state else None
    inputs = {"r": r, "w": w, "k": k, "v": v, "u": u}
    segments = packed_segments(B, T, seed) if packed else None
    return Case(inputs, state, draw.normal(*shape), draw.normal(B, H, N, N), segments).to(dtype)


def run(case: Case, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Both results of a backend and the gradient of every input, by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in case.inputs.items()}
    state = None
    if case.initial_state is not None:
        state = inputs["initial_state"] = case.initial_state.detach().requires_grad_()
    y, last = function(*(inputs[name] for name in case.inputs), state, case.segment_ids)
    grads = torch.autograd.grad([y, last], list(inputs.values()), [case.dy, case.dstate])
    return {"y": y, "state": last, **{f"d{n}": g for n, g in zip(inputs, grads, strict=True)}}


def wkv7_plain(
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

    It is written as the `rwkv` package writes it for devices without a kernel, and is the yardstick
    of the error budget: what the same maths gives without care for precision.
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


def wkv6_plain(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Like `wkv7_plain`, for WKV-6."""
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


class Deviation(NamedTuple):
    """Largest error of a kernel's result, and the largest that the budget allows."""

    error: float
    allowed: float

    @property
    def share(self) -> float:
        """The part of the budget that the error takes; above 1 it is too large."""
        return self.error / max(self.allowed, 1e-300)


def deviation(kernel: Tensor, exact: Tensor, plain: Tensor) -> Deviation:
    """What a result is off by, and may be: an infinite error if a value is not finite.

    max|kernel - exact| <= 2 max|plain - exact| + c eps(dtype) max|exact|.

    c is 1 for 16-bit types, whose sums are kept in float32. A float32 kernel rounds its own sums as
    well: a matrix product adds N = 64 terms at full magnitude, a random walk of sqrt(64) steps of
    eps/2, so c is 4. The token loop seldom pays that, as decay lets it add small terms first.
    """

    def error(x: Tensor) -> float:
        # where the exact result lies: a device may have no float64, or be much the faster
        return (x.to(exact.device).double() - exact.double()).abs().max().item()

    c = 4 if kernel.dtype == torch.float32 == plain.dtype else 1
    allowed = 2 * error(plain) + c * torch.finfo(kernel.dtype).eps * exact.abs().max().item()
    if not bool(kernel.isfinite().all()):
        return Deviation(float("inf"), allowed)
    return Deviation(error(kernel), allowed)


def assert_within_budget(kernel: Tensor, exact: Tensor, plain: Tensor, name: str = "") -> None:
    """Raises AssertionError unless all values are finite and the error is within the budget."""
    error, allowed = deviation(kernel, exact, plain)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def cap_autotuning(num: int) -> None:
    """Lets fla's kernels for RWKV choose among `num` of their settings instead of all.

    Their first calls then take seconds instead of minutes; the best setting may be left out.
    """
    import fla.ops.rwkv6
    import fla.ops.rwkv7  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for tuner in vars(module).values():
                while tuner is not None and not isinstance(tuner, Autotuner):
                    tuner = getattr(tuner, "fn", None)  # what surrounds it
                if tuner is not None:
                    tuner.configs = tuner.configs[:: -(-len(tuner.configs) // num)]


class Operator(NamedTuple):
    """All forms of one recurrence. Backends are functions of the inputs, a state and segments."""

    function: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    chunked: Callable[..., tuple[Tensor, Tensor]]
    plain: Callable[..., tuple[Tensor, Tensor]]
    make_case: Callable[..., Case]
    table: tuple[Backend, ...]


OPERATORS = {
    "wkv7": Operator(wkv7.wkv7, wkv7_reference, wkv7_chunked, wkv7_plain, wkv7_case, wkv7.TABLE),
    "wkv6": Operator(wkv6.wkv6, wkv6_reference, wkv6_chunked, wkv6_plain, wkv6_case, wkv6.TABLE),
}
