"""Projections whose weights are read when a block is shared out among devices, and not before."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkv_peft.models.frozen import FrozenLinear


class AwaitedLinear(FrozenLinear):
    """A frozen layer whose weight is still in its file, and takes no memory of its device.

    Methods are attached to it as to the layer that it will be: its `weight` has that layer's shape,
    and the dtype and device of its products. Rows that are asked for are read each time.

    Attributes:
        change: alters the layer that was read, such as by what a method took out of its weight.
    """

    def __init__(
        self,
        read: Callable[[], FrozenLinear],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        storage: str = "",
    ) -> None:
        """Stands for the layer that `read` gives, of a weight (out, in)."""
        with torch.device("meta"):
            super().__init__(shape[1], shape[0])
        nothing = torch.zeros(1, dtype=dtype, device=device)
        self.weight = nn.Parameter(nothing.expand(shape), requires_grad=False)
        self.storage, self._read = storage, read
        self.change: Callable[[FrozenLinear], None] | None = None

    def dense(
        self, dtype: torch.dtype | None = None, rows: slice = slice(None), *, copy: bool = False
    ) -> Tensor:
        """See `FrozenLinear`."""
        return self._make().dense(dtype, rows, copy=copy)

    def load(self) -> None:
        """Becomes the layer that it stands for, with the same `weight` to whoever knows that."""
        weight, found = self.weight, self._make()
        weight.data = found.weight.data
        found.weight = weight
        self.__class__ = type(found)  # type: ignore[assignment]
        vars(self).clear()
        vars(self).update(vars(found))

    def _make(self) -> FrozenLinear:
        found = self._read()
        if self.change:
            self.change(found)
        return found


def load_awaited(module: nn.Module) -> None:
    """Loads all layers within a module whose weights are still in their file."""
    for layer in module.modules():
        if isinstance(layer, AwaitedLinear):
            layer.load()
