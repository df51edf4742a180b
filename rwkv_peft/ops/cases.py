"""Inputs of the recurrences, which tests, benchmarks and the check before a run share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor

DECAYS = ("trained", "none", "fastest", "mixed", "extreme")
# some end before, some on and some after the ends of chunks of 16, 32 and 64 tokens; some have one
# token, and one has several chunks
DOCUMENT_LENGTHS = (7, 1, 24, 32, 1, 63, 64, 5, 155)


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of a recurrence and the gradients of its two results.

    Attributes:
        inputs: by name, in the order of the operator's arguments; (B, T, H, N), and u (H, N).
        initial_state: (B, H, N, N), or None.
        dy, dstate: the gradients of y (B, T, H, N) and of the last state (B, H, N, N).
        segment_ids: (B, T) int32; None if rows are not packed.
    """

    inputs: dict[str, Tensor]
    initial_state: Tensor | None
    dy: Tensor
    dstate: Tensor
    segment_ids: Tensor | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Case":
        """The same values in another dtype and on another device; states at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        state, segments = self.initial_state, self.segment_ids
        return Case(
            {name: x.to(device, dtype) for name, x in self.inputs.items()},
            None if state is None else state.to(device, wide),
            self.dy.to(device, dtype),
            self.dstate.to(device, wide),
            None if segments is None else segments.to(device),
        )

    def select(self, rows: slice, times: slice = slice(None)) -> "Case":
        """The case of some rows and tokens; u belongs to all."""
        state, segments = self.initial_state, self.segment_ids
        return Case(
            {n: x if n == "u" else x[rows, times] for n, x in self.inputs.items()},
            None if state is None else state[rows],
            self.dy[rows, times],
            self.dstate[rows],
            None if segments is None else segments[rows, times],
        )


def join_cases(cases: Sequence[Case]) -> Case:
    """One case with the rows of all cases, and the u of the first."""

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


def make_segment_ids(B: int, T: int, seed: int = 0) -> Tensor:
    """Segment ids (B, T) int32 of documents of uneven lengths, other ones in every row."""
    rows = []
    for row in range(seed, seed + B):
        lengths = islice(cycle(DOCUMENT_LENGTHS), row * 4 % 9, row * 4 % 9 + T)
        ends = torch.tensor(list(accumulate(lengths)))
        # the numbers need not begin at zero or be consecutive
        rows.append(row + 3 * torch.searchsorted(ends, torch.arange(T), right=True))
    return torch.stack(rows).int()


def make_wkv7_case(
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
    """Inputs of WKV-7 distributed as in a trained model, rounded to `dtype`.

    Args:
        B, T, H, N: batch, tokens, heads and head size.
        decay: 'trained' logits (mean -1, standard deviation 1.5), 'none' (-20), 'fastest' (+20),
            'mixed' (standard deviation 14), 'extreme' (uniform from -20 to 20).
        packed: whether rows hold several documents; no two rows are alike.
    """
    draw, shape = _Draw(seed), (B, T, H, N)
    r, w = draw.normal(*shape), draw.decay(decay, shape, -1.0)
    kk, rate = F.normalize(draw.normal(*shape), dim=-1), torch.sigmoid(draw.normal(*shape))
    k, v = draw.normal(*shape) * 0.5, draw.normal(*shape)
    state = draw.normal(B, H, N, N) if has_state else None
    inputs = {"r": r, "w": w, "k": k, "v": v, "a": -kk, "b": kk * rate}
    segments = make_segment_ids(B, T, seed) if packed else None
    return Case(inputs, state, draw.normal(*shape), draw.normal(B, H, N, N), segments).to(dtype)


def make_wkv6_case(
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
    """Inputs of WKV-6, as `make_wkv7_case` draws them; 'trained' logits have mean -2."""
    draw, shape = _Draw(seed), (B, T, H, N)
    r, w = draw.normal(*shape), draw.decay(decay, shape, -2.0)
    k, v, u = draw.normal(*shape) * 0.5, draw.normal(*shape), draw.normal(H, N)
    state = draw.normal(B, H, N, N) if has_state else None
    inputs = {"r": r, "w": w, "k": k, "v": v, "u": u}
    segments = make_segment_ids(B, T, seed) if packed else None
    return Case(inputs, state, draw.normal(*shape), draw.normal(B, H, N, N), segments).to(dtype)


def run(case: Case, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Both results of a backend, `y` and `state`, and the gradient of every input, by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in case.inputs.items()}
    state = None
    if case.initial_state is not None:
        state = inputs["initial_state"] = case.initial_state.detach().requires_grad_()
    y, last = function(*(inputs[name] for name in case.inputs), state, case.segment_ids)
    grads = torch.autograd.grad([y, last], list(inputs.values()), [case.dy, case.dstate])
    return {"y": y, "state": last, **{f"d{n}": g for n, g in zip(inputs, grads, strict=True)}}
