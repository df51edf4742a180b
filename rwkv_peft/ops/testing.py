"""Inputs and the error budget that tests and benchmarks of operators share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DECAYS = ("trained", "none", "fastest", "mixed")


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of a recurrence and the gradients of its two results.

    Attributes:
        inputs: by name, in the order of the operator's arguments; (B, T, H, N), and u (H, N).
        initial_state, dstate: (B, H, N, N); no initial state if None.
        dy: (B, T, H, N).
    """

    inputs: dict[str, Tensor]
    initial_state: Tensor | None
    dy: Tensor
    dstate: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Case":
        """The same values in another type; states at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        state = self.initial_state
        return Case(
            {name: x.to(device, dtype) for name, x in self.inputs.items()},
            None if state is None else state.to(device, wide),
            self.dy.to(device, dtype),
            self.dstate.to(device, wide),
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
        }[kind]


def wkv7_case(
    B: int = 2,
    T: int = 64,
    H: int = 2,
    N: int = 64,
    *,
    decay: str = "trained",
    has_state: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Inputs distributed as in a trained model, rounded to `dtype`.

    Args:
        decay: 'trained' logits (mean -1, deviation 1.5), 'none' (-20), 'fastest' (+20), 'mixed'
            (deviation 14).
    """
    draw, shape = _Draw(seed), (B, T, H, N)
    r, w = draw.normal(*shape), draw.decay(decay, shape, -1.0)
    kk, rate = F.normalize(draw.normal(*shape), dim=-1), torch.sigmoid(draw.normal(*shape))
    k, v = draw.normal(*shape) * 0.5, draw.normal(*shape)
    state = draw.normal(B, H, N, N) if has_state else None
    inputs = {"r": r, "w": w, "k": k, "v": v, "a": -kk, "b": kk * rate}
    return Case(inputs, state, draw.normal(*shape), draw.normal(B, H, N, N)).to(dtype)


def wkv6_case(
    B: int = 2,
    T: int = 64,
    H: int = 2,
    N: int = 64,
    *,
    decay: str = "trained",
    has_state: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Like `wkv7_case`; 'trained' logits have mean -2."""
    draw, shape = _Draw(seed), (B, T, H, N)
    r, w = draw.normal(*shape), draw.decay(decay, shape, -2.0)
    k, v, u = draw.normal(*shape) * 0.5, draw.normal(*shape), draw.normal(H, N)
    state = draw.normal(B, H, N, N) if has_state else None
    inputs = {"r": r, "w": w, "k": k, "v": v, "u": u}
    return Case(inputs, state, draw.normal(*shape), draw.normal(B, H, N, N)).to(dtype)


def run(case: Case, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Both results of a backend and the gradient of every input, by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in case.inputs.items()}
    state = None
    if case.initial_state is not None:
        state = inputs["initial_state"] = case.initial_state.detach().requires_grad_()
    y, last = function(*(inputs[name] for name in case.inputs), state)
    grads = torch.autograd.grad([y, last], list(inputs.values()), [case.dy, case.dstate])
    return {"y": y, "state": last, **{f"d{n}": g for n, g in zip(inputs, grads, strict=True)}}


def wkv7_plain(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence in the dtype of its inputs, state included, by matrix products of one token.

    It is written as the `rwkv` package writes it for devices without a kernel, and is the yardstick
    of the error budget: what the same maths gives without care for precision.
    """
    B, T, H, N = r.shape
    state = r.new_zeros(B, H, N, N) if initial_state is None else initial_state.to(r.dtype)
    decay = torch.exp(-0.606530659712633 * torch.sigmoid(w))
    y = []
    for t in range(T):
        ab = a[:, t].unsqueeze(-1) @ b[:, t].unsqueeze(-2)
        vk = v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        state = state * decay[:, t].unsqueeze(-2) + state @ ab + vk
        y.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, 1), state.to(torch.promote_types(r.dtype, torch.float32))


def wkv6_plain(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Like `wkv7_plain`, for WKV-6."""
    B, T, H, N = r.shape
    state = r.new_zeros(B, H, N, N) if initial_state is None else initial_state.to(r.dtype)
    # exp(-exp(10)) is zero, and float16 ends at exp(11)
    decay = torch.exp(-torch.exp(w.clamp(max=10)))
    y = []
    for t in range(T):
        vk = v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        y.append(((u.unsqueeze(-2) * vk + state) @ r[:, t].unsqueeze(-1)).squeeze(-1))
        state = vk + decay[:, t].unsqueeze(-2) * state
    return torch.stack(y, 1), state.to(torch.promote_types(r.dtype, torch.float32))


def assert_within_budget(kernel: Tensor, exact: Tensor, plain: Tensor, name: str = "") -> None:
    """Raises AssertionError unless all values are finite and the error is within the budget

    max|kernel - exact| <= 2 max|plain - exact| + c eps(dtype) max|exact|.

    c is 1 for 16-bit types, whose sums are kept in float32. A float32 kernel rounds its own sums as
    well: a matrix product adds N = 64 terms at full magnitude, a random walk of sqrt(64) steps of
    eps/2, so c is 4. The token loop seldom pays that, as decay lets it add small terms first.
    """
    assert bool(kernel.isfinite().all()), f"{name}: not finite"
    exact = exact.double().cpu()
    error = (kernel.double().cpu() - exact).abs().max().item()
    c = 4 if kernel.dtype == torch.float32 == plain.dtype else 1
    allowed = (
        2 * (plain.double().cpu() - exact).abs().max().item()
        + c * torch.finfo(kernel.dtype).eps * exact.abs().max().item()
    )
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
