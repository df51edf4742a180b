"""What autograd functions with a hand-written backward share."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of this name, used only where a second derivative can be asked for.

    It costs as much time as a kernel launch, and a step calls some hundred such functions.
    """
    guarded = function.once_differentiable(backward)

    def choose(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return choose
