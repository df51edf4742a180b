"""Weights that become dense beside the recurrences, before they are wanted.

Making a weight dense moves memory, and a product wants every processor and all memory traffic. A
recurrence leaves much of both: so on a stream of its own the weights that are wanted after it, up
to the next one, become dense meanwhile. Which these are is known from an earlier run of the same
kernels, so this serves graphs, that are captured after such runs.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.ops.dequantise import dequantise, kernel_for


class Stored(NamedTuple):
    """What `dequantise` takes."""

    packed: Tensor
    scale: Tensor
    storage: str
    size: int
    dtype: torch.dtype

    @property
    def key(self) -> tuple[Any, ...]:
        """Alike for what gives the same numbers."""
        return self.packed.data_ptr(), self.scale.data_ptr(), *self[2:]


# weights in the order in which they became dense, those before the first recurrence, then those
# after each
Order = list[list[Stored]]


class _Follower:
    """Makes the weights of an order dense, those after a recurrence when it begins."""

    def __init__(self, order: Order, device: torch.device) -> None:
        self._parts = iter(order[1:])
        # those of a layer; after the last there is the head too, which is many times as large
        self._most = statistics.median_high(sum(x.size for x in part) for part in order)
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._ready: dict[tuple[Any, ...], Tensor] = {}
        self._event: Any = None

    def take(self, stored: Stored) -> Tensor:
        """The dense weight."""
        dense = self._ready.pop(stored.key, None)
        if dense is None:
            return dequantise(*stored)
        self._wait()
        return dense

    def begin_recurrence(self) -> None:
        """Begins with the weights that are wanted before the next recurrence."""
        # what nobody took is written before its memory is given to others
        self._wait()
        part = next(self._parts, [])
        sums = accumulate(x.size for x in part)
        wanted = {x.key: x for x, size in zip(part, sums, strict=True) if size <= self._most}
        # memory of the stream that reads it: who had it before has been queued there
        self._ready = {key: x.packed.new_empty(x.size, dtype=x.dtype) for key, x in wanted.items()}
        if not wanted:
            return
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            for key, dense in self._ready.items():
                kernel_for(dense.device, dense.dtype)(*wanted[key][:3], dense)
            self._event = self._stream.record_event()

    def _wait(self) -> None:
        """Has the current stream wait for what was begun."""
        if self._event is not None:
            self._module.current_stream().wait_event(self._event)
            self._event = None


# for the process, as autograd runs backward in threads of its own
_noted: Order | None = None
_follower: _Follower | None = None


def make_dense(*stored: Any) -> Tensor:
    """As `dequantise`, of what was begun before where an order is followed."""
    if _follower is not None:
        return _follower.take(Stored(*stored))
    if _noted is not None:
        _noted[-1].append(Stored(*stored))
    return dequantise(*stored)


def begin_recurrence() -> None:
    """To be called before the kernels of a recurrence."""
    if _follower is not None:
        _follower.begin_recurrence()
    elif _noted is not None:
        _noted.append([])


@contextmanager
def note_order() -> Iterator[Order]:
    """Notes which weights become dense meanwhile."""
    global _noted
    _noted = [[]]
    try:
        yield _noted
    finally:
        _noted = None


@contextmanager
def follow_order(order: Order, device: torch.device) -> Iterator[None]:
    """Has weights become dense in an order that was noted, those of a layer at once."""
    global _follower
    _follower = _Follower(order, device) if order else None
    try:
        yield
    finally:
        _follower = None
