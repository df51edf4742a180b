"""AdamW over float32 masters of the trained tensors, with clipping and loss scaling."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rwkv_peft.device import PLUGINS

# official pre-training gives the decay's own vector twice the rate
DOUBLED = ("att.w0", "att.time_decay")


class Optimizer:
    """Steps the masters and copies them back into the model.

    A float32 parameter is its own master. For any other type the gradient of each micro-batch is
    added to the master's in float32 as soon as backward has made it, so that accumulation does not
    round, and a small step is not lost in a bf16 weight.

    Attributes:
        masters: the values to save, by name.
        uses_loss_scale: gradients are scaled against underflow, for fp16.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        grad_clip: float,
        is_full: bool,
        doubles_rate: bool,
        uses_loss_scale: bool,
    ) -> None:
        self._parameters = dict(trained)
        self.masters = {name: _master(p) for name, p in trained.items()}
        self._grad_clip, self.uses_loss_scale = grad_clip, uses_loss_scale
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, master in self.masters.items():
            decays = is_full and name.endswith(".weight") and master.ndim >= 2
            scale = 2.0 if is_full and doubles_rate and name.endswith(DOUBLED) else 1.0
            groups.setdefault((scale, decays), []).append(master)
        device = next(iter(self.masters.values())).device
        self._adamw = torch.optim.AdamW(
            [
                {"params": masters, "decays": decays, "lr_scale": scale}
                for (scale, decays), masters in groups.items()
            ],
            lr=0.0,
            betas=betas,
            eps=eps,
            # a package that brings a device need not bring this kernel
            fused=device.type not in PLUGINS,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=uses_loss_scale)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Puts saved values into the masters and the model."""
        for name, master in self.masters.items():
            master.copy_(values[name])
            self._parameters[name].copy_(master)

    def backward(self, objective: Tensor) -> None:
        """Adds the gradient of one micro-batch to the masters'."""
        self._scaler.scale(objective).backward()

    def step(self, lr: float, weight_decay: float = 0.0) -> float:
        """Takes one step, clears the gradients and gives their norm before clipping.

        The decay acts on weight matrices in full tuning, on nothing else.

        A step whose norm is not finite is not taken; with loss scaling that happens now and then,
        and lowers the scale.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self._scaler.unscale_(self._adamw)
        limit = self._grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.masters.values(), limit, foreach=True)
        if self.uses_loss_scale:
            self._scaler.step(self._adamw)
            self._scaler.update()
        elif norm.isfinite():
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])
        return norm.item()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def move_gradient(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    parameter.register_post_accumulate_grad_hook(move_gradient)
    return master
