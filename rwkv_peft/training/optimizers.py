"""Optimizers by name: PyTorch's own, Lion, which it has not, and AdamW with moments of 8 bits."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.device import PLUGINS, on_default_stream
from rwkv_peft.errors import ConfigError


class Lion(torch.optim.Optimizer):
    """Lion: each number moves by the rate, in the direction of the sign of a mean of gradients.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, program 1.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes one step; tensors without a gradient stay as they are."""
        for group in self.param_groups:
            first, second = group["betas"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["exp_avg"] = torch.zeros_like(x, memory_format=torch.contiguous_format)
                mean = state["exp_avg"]
                x.mul_(1 - group["lr"] * group["weight_decay"])
                x.add_(mean.lerp(x.grad, 1 - first).sign_(), alpha=-group["lr"])
                mean.lerp_(x.grad, 1 - second)


class Maker(NamedTuple):
    """How an optimizer is made.

    Attributes:
        make: of tensors, betas and epsilon; rate and decay are set before each step.
        is_elementwise: whether each number moves by itself, so that many tensors may be one.
        moments: bytes that it remembers of each number.
    """

    make: Callable[[Sequence[Tensor], tuple[float, float], float], torch.optim.Optimizer]
    is_elementwise: bool = True
    moments: int = 4


def _make_adamw(
    tensors: Sequence[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    # a package that brings a device need not bring this kernel
    fused = tensors[0].device.type not in PLUGINS
    return torch.optim.AdamW(tensors, lr=0.0, betas=betas, eps=eps, fused=fused)


def _make_sgd(
    tensors: Sequence[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.0, momentum=betas[0])


def _make_lion(
    tensors: Sequence[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    return Lion(tensors, lr=0.0, betas=betas, weight_decay=0.0)


def _make_muon(
    tensors: Sequence[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    # so that the rates of AdamW serve
    return torch.optim.Muon(tensors, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _make_adafactor(
    tensors: Sequence[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(tensors, lr=0.0)


def _make_adamw8bit(
    tensors: Sequence[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    adamw: Any = require_package("adamw8bit").optim.AdamW8bit

    class OnDefaultStream(adamw):  # type: ignore[misc]
        """Its kernels are launched there whatever the current stream is, and nobody waits."""

        def step(self, closure: Any = None) -> None:
            with on_default_stream(tensors[0].device):
                super().step(closure)

    made: torch.optim.Optimizer = OnDefaultStream(
        tensors, lr=0.0, betas=betas, eps=eps, weight_decay=0.0
    )
    return made


def require_package(optimizer: str) -> Any:
    """The package that an optimizer comes from, None if that is PyTorch or this program.

    Raises:
        ConfigError: it is not installed.
    """
    if optimizer != "adamw8bit":
        return None
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"--optimizer adamw8bit needs bitsandbytes, which cannot be imported ({error}): pip "
            "install 'rwkv-peft[bitsandbytes]', or use --optimizer adamw"
        ) from error
    return bitsandbytes


OPTIMIZERS = {
    "adamw": Maker(_make_adamw, moments=8),
    # its moments have a scale for each 256 numbers of a tensor
    "adamw8bit": Maker(_make_adamw8bit, is_elementwise=False, moments=2),
    "sgd": Maker(_make_sgd),
    "lion": Maker(_make_lion),
    "muon": Maker(_make_muon, is_elementwise=False),
    "adafactor": Maker(_make_adafactor, is_elementwise=False, moments=0),
}
# tables of a row a token, which Muon leaves to AdamW, as it does whatever is no matrix
_TABLES = ("emb.weight", "head.weight")


def optimizer_for(optimizer: str, name: str, parameter: Tensor) -> str:
    """The optimizer by which one tensor is stepped, where another is asked for."""
    is_matrix = parameter.ndim == 2 and not name.endswith(_TABLES)
    return "adamw" if optimizer == "muon" and not is_matrix else optimizer
