"""A registered operator called past PyTorch's dispatcher, which can outlast the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def shortcut(
    operator: Callable[..., Any],
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What `operator` computes, by its Python parts; itself where something else must see the call.

    Args:
        operator: registered with `torch.library` from the other three; its first argument is a
            tensor, its last says whether to keep what backward needs.
        forward, setup_context, backward: as `torch.autograd.Function` has them.
    """

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(once_differentiable(backward)),
    }
    direct: Any = type("Direct", (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        # a compiler traces the operator, and tensors of other kinds have their own way with it
        if torch.compiler.is_compiling() or type(arguments[0]) is not Tensor:
            return operator(*arguments)
        return direct.apply(*arguments) if arguments[-1] else forward(*arguments)

    return call
