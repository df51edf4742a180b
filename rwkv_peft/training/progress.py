"""Where a run is: all that changes from step to step beside the optimizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps taken.
        position: micro-batches before the next one, which is a place in the data.
        tokens: tokens seen, without padding.
        loss_sum: cross-entropy in nats over this epoch so far.
        loss_weight: loss weights that it is a sum over.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss of this epoch so far, in nats per trained token."""
        return self.loss_sum / (self.loss_weight or 1.0)

    def begin_epoch(self) -> None:
        """Forgets the losses of the last epoch."""
        self.loss_sum = self.loss_weight = 0.0

    def take(self, micro_batches: int, tokens: int, loss: float, weight: float) -> None:
        """Moves on by an optimizer step of so many micro-batches, with its mean loss."""
        self.step += 1
        self.position += micro_batches
        self.tokens += tokens
        self.loss_sum += loss * weight
        self.loss_weight += weight

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


class RandomGenerators:
    """The generators of PyTorch that initialisation and dropout draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of the CPU's generator, and of the device's if that is another."""
        states = {"cpu": torch.get_rng_state()}
        if self._device.type != "cpu":
            own = torch.get_device_module(self._device).get_rng_state(self._device)
            states[self._device.type] = own
        return states

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up what `state_dict` gave, as far as this device has such a generator."""
        # copies, as PyTorch reads the storage of such a tensor from its beginning, where a tensor
        # that is mapped from a file does not begin
        torch.set_rng_state(state["cpu"].clone())
        if self._device.type != "cpu" and self._device.type in state:
            module = torch.get_device_module(self._device)
            module.set_rng_state(state[self._device.type].clone(), self._device)
