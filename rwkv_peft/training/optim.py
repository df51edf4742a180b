"""AdamW over float32 masters of the trained tensors, with clipping and loss scaling."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rwkv_peft.device import PLUGINS

# official pre-training gives these vectors higher rates
RATES = {"att.w0": 2.0, "att.time_decay": 2.0, "att.time_first": 3.0}
# bytes of gradients that may wait in the model's type to be moved together; larger ones never wait
MAX_WAITING = 16 * 2**20


class Optimizer:
    """Steps the masters and copies them back into the model.

    A float32 parameter is its own master. For any other type the gradient of each micro-batch is
    added to the master's in float32 during backward, so that accumulation does not round, and a
    small step is not lost in a bf16 weight.

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
        plain: Collection[str],
        raises_rates: bool,
        uses_loss_scale: bool,
        decays_adapter: bool = False,
        clip_groups: Mapping[str, str] | None = None,
    ) -> None:
        """Groups the tensors by their rates and decays.

        Args:
            plain: names of the model's own tensors; the others are an adapter's or a state's.
            raises_rates: give the official higher rates to those vectors of the model.
            decays_adapter: let the weight decay act on matrices of the adapter too.
            clip_groups: which tensors are clipped together, by name; all, if None.
        """
        self._parameters = dict(trained)
        self._gradients = _Gradients()
        self.masters = {name: self._gradients.master_of(p) for name, p in trained.items()}
        # by type, since PyTorch's copy into a list takes all of it for what its first tensor is
        self._copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for name, parameter in trained.items():
            if parameter is not self.masters[name]:
                to, values = self._copied.setdefault(parameter.dtype, ([], []))
                to.append(parameter)
                values.append(self.masters[name])
        self._grad_clip, self.uses_loss_scale = grad_clip, uses_loss_scale
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, master in self.masters.items():
            is_plain = name in plain
            is_matrix = master.ndim == 2 and (name.endswith(".weight") or not is_plain)
            decays = is_matrix and (is_plain or decays_adapter)
            rates = [rate for end, rate in RATES.items() if name.endswith(end)]
            scale = rates[0] if rates and is_plain and raises_rates else 1.0
            groups.setdefault((scale, decays), []).append(master)
        device = next(iter(self.masters.values())).device
        together: dict[str, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            together.setdefault((clip_groups or {}).get(name, ""), []).append(master)
        self._clipped_together = list(together.values())
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
        """Puts saved values into the masters of these names and into the model."""
        for name, value in values.items():
            self.masters[name].copy_(value)
            self._parameters[name].copy_(self.masters[name])

    def backward(self, objective: Tensor) -> None:
        """Adds the gradient of one micro-batch to the masters'."""
        self._scaler.scale(objective).backward()
        self._gradients.move()

    def step(
        self,
        lr: float,
        weight_decay: float = 0.0,
        *,
        before_step: Callable[[Mapping[str, nn.Parameter]], None] | None = None,
        after_step: Callable[[Mapping[str, nn.Parameter]], None] | None = None,
    ) -> float:
        """Takes one step, clears the gradients and gives their norm before clipping.

        The decay acts on weight matrices of the model, and on nothing else unless asked to.
        `before_step` and `after_step` may change the gradients and the masters.

        A step whose norm is not finite is not taken; with loss scaling that happens now and then,
        and lowers the scale.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self._scaler.unscale_(self._adamw)
        if before_step:
            before_step(self.masters)
        limit = self._grad_clip or float("inf")
        norms = [
            nn.utils.clip_grad_norm_(masters, limit, foreach=True)
            for masters in self._clipped_together
        ]
        total = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
        # waits for the gradients, and nothing after it waits: a device steps while the host goes on
        norm = total.item()
        if self.uses_loss_scale:
            self._scaler.step(self._adamw)
            self._scaler.update()
        elif math.isfinite(norm):
            self._adamw.step()
        if after_step and math.isfinite(norm):
            after_step(self.masters)
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for to, values in self._copied.values():
                torch._foreach_copy_(to, values)
        return norm


class _Gradients:
    """Gradients in the model's type on their way to float32 masters.

    Many go at once, as a launch costs more time than a small tensor does.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[nn.Parameter, Tensor]] = []
        self._waiting_bytes = 0

    def master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter itself, or a float32 copy that receives its gradients."""
        if parameter.dtype == torch.float32:
            return parameter
        master = nn.Parameter(parameter.detach().float())
        parameter.register_post_accumulate_grad_hook(partial(self._take, master))
        return master

    def _take(self, master: nn.Parameter, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._waiting_bytes + gradient.nbytes > MAX_WAITING:
            self.move()
        if gradient.nbytes <= MAX_WAITING:
            self._waiting.append((master, gradient))
            self._waiting_bytes += gradient.nbytes
        elif master.grad is None:
            master.grad = gradient.float()
        else:
            # without a float32 copy of a large one
            master.grad += gradient

    @torch.no_grad()
    def move(self) -> None:
        """Adds the gradients that wait to the masters'."""
        if not self._waiting:
            return
        masters, gradients = zip(*self._waiting, strict=True)
        self._waiting, self._waiting_bytes = [], 0
        wide = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(wide, gradients)
        sums, addends = [], []
        for master, gradient in zip(masters, wide, strict=True):
            if master.grad is None:
                master.grad = gradient
            else:
                sums.append(master.grad)
                addends.append(gradient)
        if sums:
            torch._foreach_add_(sums, addends)
