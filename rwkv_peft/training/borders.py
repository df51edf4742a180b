"""The states between the chunks of a row: where they are kept until backward needs them."""

import math
from typing import NamedTuple

import torch

from rwkv_peft.models.config import ModelConfig
from rwkv_peft.state import RWKVState


class Room(NamedTuple):
    """Memory for states at borders, in bytes.

    Attributes:
        device: where the model is, filled first.
        host: beyond it; a CPU has this alone.
    """

    device: int
    host: int


class Pinned:
    """Pinned memory for states, which is used again from row to row.

    Whoever reads or writes it does so in the order of a device's work, so that what was given back
    may be written at once, while its last reading is still to come. PyTorch's own store would wait
    for that, and take new memory meanwhile.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, ...], list[RWKVState]] = {}

    def take(self, state: RWKVState) -> RWKVState:
        """Memory for a state like this one."""
        free = self._free.get(tuple(x.shape for x in state))
        if free:
            return free.pop()
        return RWKVState(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in state))

    def give_back(self, state: RWKVState) -> None:
        """Takes memory that nobody reads later than what the device has been told to do so far."""
        self._free.setdefault(tuple(x.shape for x in state), []).append(state)


class Borders:
    """A stack of states, on their device while it has room and on the host beyond.

    Nobody waits for the copies: they are made between pinned memory and the device in the order of
    the device's other work.
    """

    def __init__(self, room: int, pinned: Pinned | None = None) -> None:
        """Begins empty.

        Args:
            room: bytes on the device.
            pinned: memory of the host beyond.
        """
        self._room, self._used, self._pinned = room, 0, pinned or Pinned()
        self._states: list[RWKVState | None] = []
        self._devices: list[torch.device | None] = []

    def push(self, state: RWKVState | None) -> None:
        """Keeps a state; None is kept as it is, and so is one with a graph."""
        size, device = num_bytes(state), None
        if state is not None and self._used + size > self._room and _can_move(state):
            device, own = state.wkv.device, self._pinned.take(state)
            for mine, x in zip(own, state, strict=True):
                mine.copy_(x, non_blocking=True)
            state = own
        else:
            self._used += size
        self._states.append(state)
        self._devices.append(device)

    def pop(self) -> RWKVState | None:
        """The last state that is kept, on the device that it came from."""
        state, device = self._states.pop(), self._devices.pop()
        if state is not None and device is not None:
            found = RWKVState(*(x.to(device, non_blocking=True) for x in state))
            self._pinned.give_back(state)
            return found
        self._used -= num_bytes(state)
        return state

    def __len__(self) -> int:
        return len(self._states)


def _can_move(state: RWKVState) -> bool:
    return state.wkv.device.type != "cpu" and not any(x.requires_grad for x in state)


def num_bytes(state: RWKVState | None) -> int:
    """The memory that a state takes."""
    return 0 if state is None else sum(x.nbytes for x in state)


class Taken(NamedTuple):
    """Bytes that states at borders take."""

    device: int
    host: int


class BorderSizes:
    """How much memory the states of so many rows take.

    Args:
        dtype: of the shifts; the operator's states are float32.
        device: where the model is.
    """

    def __init__(
        self, model_config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        L, D = model_config.n_layer, model_config.n_embd
        heads = model_config.n_head * model_config.head_size**2
        sizes = [L * rows * D * dtype.itemsize] * 2 + [L * rows * heads * 4]
        self.each, self._is_cpu = sum(sizes), device.type == "cpu"
        # PyTorch takes pinned memory in powers of two
        self._pinned = sum(1 << (size - 1).bit_length() for size in sizes)

    def count(self, room: Room) -> int:
        """States that have room."""
        if self._is_cpu:
            return room.host // self.each
        return room.device // self.each + room.host // self._pinned

    def take(self, count: int, room: Room) -> Taken:
        """What so many states take, the first of them on the device."""
        if self._is_cpu:
            return Taken(0, count * self.each)
        on_device = min(count, room.device // self.each)
        return Taken(on_device * self.each, (count - on_device) * self._pinned)


def least_room(count: int) -> int:
    """States that must be kept at once for `count` chunks: twice their root."""
    return 2 * math.ceil(math.sqrt(count))


def split(count: int, room: int) -> list[int]:
    """Numbers of chunks, in order, of the parts at whose borders states are kept.

    All parts are single chunks if so many borders have room. If not, the first parts are longer:
    when all behind them is done, the chunks of each go forward once more to find the borders inside
    it, for which there is room by then. The parts are as few as they can be.

    Args:
        count: chunks, at least one.
        room: states that may be kept at once, at least `least_room(count)`.
    """
    if count - 1 <= room:
        return [1] * count
    long = next(n for n in range(1, room) if (n + 1) * (room - n + 1) >= count)
    single = room - long + 1
    rest = count - single
    return [rest // long + (i < rest % long) for i in range(long)] + [1] * single


def count_passes(count: int, room: int) -> int:
    """Times that one of `count` chunks goes forward, with or without backward behind it."""
    if count == 1:
        return 1
    parts = split(count, room)
    inner = sum(count_passes(part, room) for part in parts)
    return inner + count - parts[-1]
