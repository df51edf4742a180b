"""Activations that are computed again in backward instead of being kept (gradient checkpointing).

`torch.utils.checkpoint` does the same, with half a dozen calls of Python for each tensor that a
block keeps. Where a step is bound by the host, as those of one short row are, that is a seventh of
its time; here it is one short call.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rwkv_peft.models.offload import HostStore, Kept


def recompute(
    function: Callable[..., Any], x: Tensor, *args: Any, host: HostStore | None = None
) -> Any:
    """The result of `function(x, *args)`, which keeps only its arguments for backward.

    Backward calls it again, with the random generators of the CPU and of x's device set as they
    were the first time; it must then do the same.

    Args:
        host: keeps x, in place of the device.
    """
    call = _Call(function, host.keep(x) if host else x, args, x.device)
    with saved_tensors_hooks(call.note, call.find):
        return function(x, *args)


class _Slot:
    """What an operation saves in place of a tensor, which the second call puts into it.

    The operation drops it once backward has used it.
    """

    __slots__ = ("__weakref__", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class _Complete(Exception):
    """The second call has made all tensors that backward needs."""


class _Call:
    """A call, and the slots of the tensors that its operations save, in the order of saving."""

    def __init__(
        self,
        function: Callable[..., Any],
        x: Tensor | Kept,
        args: tuple[Any, ...],
        device: torch.device,
    ) -> None:
        self._function, self._x, self._args, self._device = function, x, args, device
        self._slots: list[ref[_Slot]] = []
        self._random = _random_states(device)

    def note(self, _: Tensor) -> _Slot:
        """Gives the next slot in place of a tensor."""
        slot = _Slot()
        self._slots.append(ref(slot))
        return slot

    def find(self, slot: _Slot) -> Tensor:
        """The tensor of a slot."""
        if slot.tensor is None:
            self._fill()
        assert slot.tensor is not None
        return slot.tensor

    def _fill(self) -> None:
        left = iter(self._slots)
        last = self._slots[-1]

        def keep(x: Tensor) -> Tensor:
            # without the graph of this call
            x = x.detach()
            place = next(left)
            if slot := place():
                slot.tensor = x
            if place is last:
                raise _Complete
            return x

        devices = [] if self._device.type == "cpu" else [self._device]
        with (
            torch.random.fork_rng(devices, device_type=self._device.type),
            torch.enable_grad(),
            saved_tensors_hooks(keep, lambda x: x),
            suppress(_Complete),
        ):
            _set_random_states(self._device, self._random)
            x = self._x.fetch() if isinstance(self._x, Kept) else self._x
            self._function(x, *self._args)


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the generators of the CPU and, if it is another device, of that."""
    own = None
    if device.type != "cpu":
        module = torch.get_device_module(device)
        is_captured = getattr(module, "is_current_stream_capturing", bool)()
        # a graph has no state to read; where numbers are drawn, no recomputed block is captured
        own = None if is_captured else module.get_rng_state(device)
    return torch.get_rng_state(), own


def _set_random_states(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], device)
