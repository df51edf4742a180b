"""Inputs and the error budget that tests and benchmarks of operators share."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

DECAYS = ("trained", "none", "fastest", "mixed")


@dataclass(frozen=True, slots=True)
class Wkv7Case:
    """Inputs of wkv7 and the gradients of its two results.

    All (B, T, H, N) but `initial_state` and `dstate` (B, H, N, N), which may be None.
    """

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    initial_state: Tensor | None
    dy: Tensor
    dstate: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Wkv7Case":
        """The same values in another type; states at least float32."""
        state_dtype = torch.promote_types(dtype, torch.float32)
        moved = {}
        for f in fields(self):
            x: Tensor | None = getattr(self, f.name)
            is_state = f.name in ("initial_state", "dstate")
            moved[f.name] = None if x is None else x.to(device, state_dtype if is_state else dtype)
        return Wkv7Case(**moved)  # type: ignore[arg-type]


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
) -> Wkv7Case:
    """Inputs distributed as in a trained model, rounded to `dtype`.

    Args:
        decay: 'trained' logits (mean -1, deviation 1.5), 'none' (-20), 'fastest' (+20), 'mixed'
            (deviation 14).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (B, T, H, N)
    w = {
        "trained": normal(*shape) * 1.5 - 1,
        "none": torch.full(shape, -20.0, dtype=torch.float64),
        "fastest": torch.full(shape, 20.0, dtype=torch.float64),
        "mixed": normal(*shape) * 14,
    }[decay]
    kk = F.normalize(normal(*shape), dim=-1)
    rate = torch.sigmoid(normal(*shape))
    case = Wkv7Case(
        r=normal(*shape),
        w=w,
        k=normal(*shape) * 0.5,
        v=normal(*shape),
        a=-kk,
        b=kk * rate,
        initial_state=normal(B, H, N, N) if has_state else None,
        dy=normal(*shape),
        dstate=normal(B, H, N, N),
    )
    return case.to(dtype)


def run_wkv7(case: Wkv7Case, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Both results of a backend and the gradient of every input, by name."""
    names = ["r", "w", "k", "v", "a", "b"] + ["initial_state"] * (case.initial_state is not None)
    inputs = [getattr(case, name).detach().requires_grad_() for name in names]
    state = inputs[6] if len(inputs) > 6 else None
    y, last = function(*inputs[:6], state)
    grads = torch.autograd.grad([y, last], inputs, [case.dy, case.dstate])
    return {"y": y, "state": last, **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}


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
