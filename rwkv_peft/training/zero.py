"""The optimizer of a run whose trained tensors DeepSpeed has; see `parallel.deepspeed`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.parallel.deepspeed import MOMENTS, DeepSpeed, Trained
from rwkv_peft.training.by_name import Computed
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.optim import Optimizer


class ZeroOptimizer(Optimizer):
    """Until DeepSpeed starts, trained tensors are as they came, with finer values beside them.

    A checkpoint holds whole tensors by their names, as that of one process does, so that it serves
    another number of ranks and another strategy too.
    """

    def __init__(
        self,
        strategy: DeepSpeed,
        trained: Mapping[str, nn.Parameter],
        grouping: Grouping,
        *,
        betas: tuple[float, float],
        eps: float,
        grad_clip: float,
    ) -> None:
        """Groups the tensors by their rates and decays; see `Optimizer`."""
        groups: dict[tuple[float, bool], list[str]] = {}
        for kind, names in grouping.group(trained).items():
            groups.setdefault((kind.lr_scale, kind.decays), []).extend(names)
        make = partial(torch.optim.AdamW, lr=0.0, betas=betas, eps=eps, fused=True)
        strategy.trained = Trained(trained, groups, make, grad_clip)
        strategy.after_start.append(self._give)
        self._zero, self._parameters = strategy, dict(trained)
        self._finer: dict[str, Tensor] = {}
        self._moments: Mapping[str, Mapping[str, Tensor]] = {}
        self.uses_loss_scale = False

    @property
    def can_skip(self) -> bool:
        """Whether `step` may be told by a tensor that it is to change nothing."""
        return False

    @property
    def holders(self) -> list[Tensor]:
        """Nothing: DeepSpeed has the gradients."""
        return []

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Gives tensors values, as fine as float32, before DeepSpeed starts."""
        assert not self._zero.has_started
        for name, value in values.items():
            parameter = self._parameters[name]
            parameter.copy_(value)
            if parameter.dtype != torch.float32:
                self._finer[name] = value.to("cpu", torch.float32, copy=True)

    @property
    def values(self) -> Mapping[str, Tensor]:
        """In float32, by name; once DeepSpeed has started all ranks ask for one together."""
        return Computed(self._parameters, self._value)

    def _value(self, name: str) -> Tensor:
        if self._zero.has_started:
            return self._zero.value(name)
        parameter = self._parameters[name]
        return self._finer[name].to(parameter.device) if name in self._finer else parameter.float()

    def backward(self, objective: Tensor) -> None:
        """Adds the gradient of an objective (), such as that of one micro-batch."""
        self._zero.backward(objective)

    def forget(self) -> None:
        """Does nothing: there are no graphs whose capture could fail."""

    def clip(
        self,
        before: Callable[[], None] | None = None,
        rates: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """Takes the whole step, unless the norm is not finite, and gives the norm (1,)."""
        return self._zero.step(*rates).reshape(1)

    def step(
        self,
        lr: float,
        weight_decay: float = 0.0,
        *,
        is_finite: bool | Tensor = True,
        after: Callable[[Optimizer], None] | None = None,
    ) -> None:
        """Does nothing: `clip` has taken the step."""

    def state_dict(self) -> dict[str, Any]:
        """What `Optimizer` gives, gathered when a name is asked for, which all ranks must do."""
        moments = Computed(self._parameters, self._read)
        return {"values": self.values, "moments": moments, "scaler": {}}

    def _read(self, name: str) -> dict[str, Tensor]:
        found = {what: self._zero.value(name, what) for what in MOMENTS}
        return {"step": self._zero.steps, **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave, before DeepSpeed starts.

        Raises:
            KeyError: it is of other tensors, or of another optimizer.
        """
        self.load(state["values"])
        self._moments = state["moments"]
        wanted = ("step", *MOMENTS)
        for moments in self._moments.values():
            if moments and moments.keys() != set(wanted):
                raise KeyError(
                    f"of a tensor there is {', '.join(moments)}, not {', '.join(wanted)}"
                )

    def _give(self) -> None:
        for name, value in self._finer.items():
            self._zero.set(name, value)
        # a tensor that has none has had no gradient
        moments = {name: x for name, x in self._moments.items() if x}
        self._zero.begin_moments(max((float(x["step"]) for x in moments.values()), default=0.0))
        for name, found in moments.items():
            for what in MOMENTS:
                self._zero.set(name, found[what], what)
        self._finer, self._moments = {}, {}
