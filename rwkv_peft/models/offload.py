"""Inputs of blocks that wait in the host's memory for backward (activation offloading)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostStore:
    """Memory of the host, pinned for a device that is not the CPU, which is used again.

    Copies are made in the order of the device's other work, and nobody waits for them: so memory
    that is given back may be written at once, while its last reading is still to come. A graph
    captures copies to and from what it took when it was captured, and the memory lives as long as
    this store. What is kept outside of a graph must not be read after a graph was replayed.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def keep(self, x: Tensor) -> "Kept":
        """Copies a tensor to the host."""
        # as PyTorch's own store does; so lengths that come share their memory
        size = 1 << (x.nbytes - 1).bit_length()
        free = self._free.setdefault(size, [])
        if free:
            return Kept(x, free.pop(), free)
        is_pinned = x.device.type != "cpu"
        memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
        return Kept(x, memory, free)

    @contextmanager
    def keep_saved(self, x: Tensor) -> Iterator[None]:
        """Has operations inside that save x for backward save a copy on the host in its place."""

        # what is saved keeps these functions, which must not keep x
        place = x.data_ptr(), x.shape, x.stride()

        def pack(saved: Tensor) -> "Tensor | Kept":
            is_x = place == (saved.data_ptr(), saved.shape, saved.stride())
            return self.keep(saved) if is_x else saved

        def unpack(kept: "Tensor | Kept") -> Tensor:
            return kept.fetch() if isinstance(kept, Kept) else kept

        with saved_tensors_hooks(pack, unpack):
            yield


class Kept:
    """A tensor on the host, whose memory is given back when nobody has this any more."""

    def __init__(self, x: Tensor, memory: Tensor, free: list[Tensor]) -> None:
        self._memory, self._free, self._device = memory, free, x.device
        self._copy = memory[: x.nbytes].view(x.dtype).view(x.shape)
        self._copy.copy_(x.detach(), non_blocking=True)
        self._requires_grad = x.requires_grad

    def fetch(self) -> Tensor:
        """A copy on the device that the tensor came from, a leaf."""
        found = self._copy.to(self._device, non_blocking=True, copy=True)
        return found.requires_grad_(self._requires_grad)

    def __del__(self) -> None:
        self._free.append(self._memory)
