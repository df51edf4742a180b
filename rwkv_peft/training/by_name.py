"""What an optimizer holds of each tensor, by the tensor's name, whatever it steps as one."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rwkv_peft.parallel.shard import Shard
from rwkv_peft.training.flat import Flat

_T = TypeVar("_T")
OF_TORCH = (torch.optim.Adam, torch.optim.SGD, torch.optim.Muon, torch.optim.Adafactor)


@dataclass(frozen=True, slots=True)
class Memory:
    """What an optimizer remembers of one tensor.

    Attributes:
        stepped: the tensor that the optimizer steps.
        flat, index: of a tensor that is stepped with others as one; None otherwise.
    """

    optimizer: torch.optim.Optimizer
    stepped: Tensor
    flat: Flat | None
    index: int

    def read(self, shard: Shard | None = None) -> dict[str, Any]:
        """By the optimizer's names: views of tensors, and numbers.

        Args:
            shard: of a tensor of which this rank has a part; what is of its shape comes whole.
        """
        found = {k: x for k, x in self.optimizer.state[self.stepped].items() if x is not None}
        if shard:
            return {k: shard.gather(x) if _is_like(x) else x for k, x in found.items()}
        if self.flat is None:
            return found
        return {k: x if x.ndim == 0 else self.flat.part(x, self.index) for k, x in found.items()}

    def write(
        self, values: Mapping[str, Any], device: torch.device, shard: Shard | None = None
    ) -> None:
        """Takes up what `read` gave.

        Raises:
            KeyError: for other tensors of this kind it gave other things.
            TypeError: it gave no such values.
        """
        state = self.optimizer.state
        kind = self._kind(self.stepped)
        alike = (held for x, held in state.items() if held and self._kind(x) == kind)
        first = next(alike, values)
        if values and first.keys() != values.keys():
            raise KeyError(f"of a tensor there is {', '.join(values)}, not {', '.join(first)}")
        for key, x in values.items():
            # PyTorch's own optimizers remember tensors alone
            is_tensor = isinstance(first[key], Tensor) or isinstance(self.optimizer, OF_TORCH)
            if not isinstance(x, Tensor if is_tensor else (int, float)):
                raise TypeError(f"{key} of a tensor is {str(x)[:40]!r}")
        held = state[self.stepped]
        if shard:
            values = {k: shard.cut(x) if _is_like(x) else x for k, x in values.items()}
        for key, x in values.items():
            if self.flat is None or x.ndim == 0:
                held[key] = x.to(device, copy=True) if isinstance(x, Tensor) else x
                continue
            if key not in held:
                held[key] = torch.zeros_like(
                    self.stepped, dtype=torch.float32, memory_format=torch.contiguous_format
                )
            self.flat.part(held[key], self.index).copy_(x)

    def _kind(self, x: Tensor) -> tuple[int, bool]:
        """What decides which things an optimizer remembers of a tensor."""
        # of small ones bitsandbytes keeps no moments in 8 bits
        small = getattr(getattr(self.optimizer, "args", None), "min_8bit_size", 0)
        return x.ndim, x.numel() < small


def _is_like(x: Any) -> bool:
    """Whether it has a number for each of its tensor's, and is no count of steps."""
    return isinstance(x, Tensor) and x.ndim > 0


class Computed(Mapping[str, _T]):
    """Computes what belongs to a name when asked for it."""

    def __init__(self, names: Collection[str], compute: Callable[[str], _T]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: str) -> _T:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ByName:
    """What is asked of an optimizer by the names of its tensors: values, gradients, moments.

    Values and gradients are in float32. What ranks have parts of is whole, and asked by all ranks.
    """

    _parameters: dict[str, nn.Parameter]
    # where in a flat buffer a 16-bit tensor lies
    _places: dict[Tensor, tuple[Flat, int]]
    _shards: dict[str, Shard]
    _states: dict[Tensor, Memory]
    _device: torch.device
    _scaler: Any

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Gives the tensors of these names values, as fine as float32."""
        for name, value in values.items():
            parameter = self._parameters[name]
            if parameter in self._places:
                flat, i = self._places[parameter]
                flat.set(i, value)
            else:
                parameter.copy_(self._shards[name].cut(value) if name in self._shards else value)

    @property
    def values(self) -> Mapping[str, Tensor]:
        """In float32, by name, each computed when asked for."""
        return Computed(self._parameters, self._value)

    @property
    def gradients(self) -> Mapping[str, Tensor | None]:
        """Of the step so far, in float32, by name, None where there is none."""
        return Computed(self._parameters, self._gradient)

    def _value(self, name: str) -> Tensor:
        if name in self._shards:
            return self._shards[name].gather()
        parameter = self._parameters[name]
        if parameter not in self._places:
            return parameter
        flat, i = self._places[parameter]
        return flat.value(i)

    def _gradient(self, name: str) -> Tensor | None:
        parameter = self._parameters[name]
        if parameter not in self._places:
            return parameter.grad
        flat, i = self._places[parameter]
        return flat.gradient(i)

    def state_dict(self) -> dict[str, Any]:
        """Values and moments in float32 by the names of the tensors, and the loss scale.

        What ranks have parts of is gathered when a name is asked for, which all of them must do.
        """
        moments: Mapping[str, Any] = Computed(self._parameters, self._read)
        values: Mapping[str, Any] = self.values
        if not self._shards:
            moments = dict(moments)
            values = {name: value.detach() for name, value in values.items()}
        return {"values": values, "moments": moments, "scaler": self._scaler.state_dict()}

    def _read(self, name: str) -> dict[str, Any]:
        return self._states[self._parameters[name]].read(self._shards.get(name))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave, on this optimizer's device.

        Raises:
            KeyError: it is of other tensors.
        """
        self.load(state["values"])
        for name, moments in state["moments"].items():
            shard, memory = self._shards.get(name), self._states[self._parameters[name]]
            memory.write(moments, self._device, shard)
        self._scaler.load_state_dict(state["scaler"] or self._scaler.state_dict())
