"""What the functions with a backward of their own share."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of this name, at work only where a second derivative can be asked for.

    Its own work costs as much as a launch, and a step calls some hundred such functions.
    """
    guarded = function.once_differentiable(backward)

    def choose(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return choose
