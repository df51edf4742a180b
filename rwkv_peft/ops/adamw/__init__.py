"""AdamW on bf16 numbers and the bits that they lack, in one pass over them."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.triton import Launcher, Variant, objection

_BLOCK = 1024
# of heads, which are no matter here: one that Triton's backends serve
_HEAD_SIZE = 64


def steps_in_place(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether `step_in_place` can take an optimizer's steps on a device."""
    return type(optimizer) is torch.optim.AdamW and _has_kernel(device)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return objection(Request(device, torch.bfloat16, _HEAD_SIZE), shared_memory=0) is None


@functools.cache
def launcher() -> Launcher:
    """The kernel."""
    from rwkv_peft.ops.adamw.triton_kernels import step

    return Launcher(step, num_warps=4)


def step_in_place(
    optimizer: torch.optim.Optimizer,
    master: Tensor,
    high: Tensor,
    low: Tensor,
    gradient: Tensor,
    factor: Tensor | None,
) -> None:
    """Takes the step that torch.optim.AdamW would take with its one tensor, `master`.

    No float32 copy of the values is made. What is remembered is what AdamW remembers.

    Args:
        high, low: (n,) bfloat16 and int16, the values as `split` leaves them, changed in place.
        gradient: (n,) bfloat16 or float32.
        factor: () float32, by which the gradient is multiplied; None for 1.
    """
    (group,), state = optimizer.param_groups, optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), device=high.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(high, dtype=torch.float32)
    mean, square, taken = state["exp_avg"], state["exp_avg_sq"], state["step"]
    skips: Tensor | None = getattr(optimizer, "found_inf", None)
    taken += 1 if skips is None else 1 - skips
    tensors = (high.view(torch.int16), low, gradient, mean, square, taken)
    lr, betas = float(group["lr"]), group["betas"]
    numbers = [x for beta in betas for x in (beta, 1 - beta, math.log(beta))]
    launcher()(
        (-(-high.numel() // _BLOCK), 1, 1),
        (*tensors, *(mean if x is None else x for x in (factor, skips))),
        (high.numel(), lr, lr * group["weight_decay"], *numbers, float(group["eps"])),
        (factor is not None, skips is not None, _BLOCK),
    )


def variants() -> Iterator[Variant]:
    """All that the kernel is compiled to."""
    for gradient in ("*bf16", "*fp32"):
        for flags in ((False, False), (False, True), (True, False), (True, True)):
            tensors = ("*i16", "*i16", gradient, *["*fp32"] * 5)
            yield launcher(), (*tensors, "i32", *["fp32"] * 9, *flags, _BLOCK)
