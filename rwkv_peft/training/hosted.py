"""What an optimizer remembers, in the host's memory (optimizer offloading)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.device import leave_on_host
from rwkv_peft.training.optim import Optimizer, Part

# numbers of a tensor that is worth leaving
LEAST = 4096


class HostOptimizer(Optimizer):
    """Leaves moments, and the bits that 16-bit numbers lack, in pinned memory of the host.

    A GPU reads and writes them there by itself, over the bus, so that its steps are the same. On
    the device there are at most the moments of one buffer, when they are made.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what `Optimizer` takes."""
        super().__init__(*args, **options)
        self._leaving = [LeavingPart.of(part) for part in self._parts]
        self._parts = list(self._leaving)
        for part in self._parts:
            if part.flat:
                part.flat.bits = leave_on_host(part.flat.bits, self._device)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Optimizer`."""
        super().load_state_dict(state)
        for part in self._leaving:
            part.leave()


@dataclass(frozen=True, slots=True)
class LeavingPart(Part):
    """A part whose moments are left on the host when they are made.

    Attributes:
        left: what was left, by the tensor that is stepped and the optimizer's name for it.
    """

    left: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, part: Part) -> "LeavingPart":
        """Another's, leaving."""
        return cls(part.kind, part.optimizer, part.holder, part.flat, part.singles)

    def step(self, lr: float, weight_decay: float) -> None:
        """See `Part`."""
        Part.step(self, lr, weight_decay)
        self.leave()

    def leave(self) -> None:
        """Has all moments on the host that are not there."""
        for stepped, state in self.optimizer.state.items():
            left = self.left.setdefault(stepped, {})
            for key, x in state.items():
                if isinstance(x, Tensor) and x.numel() >= LEAST and left.get(key) is not x:
                    state[key] = left[key] = leave_on_host(x, x.device)
