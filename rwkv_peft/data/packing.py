"""Sequence packing: which lengths share a row, so that few positions are left unused."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packing(NamedTuple):
    """Rows, each made of slots; a slot takes one slice of its length.

    Attributes:
        lengths: (slots,) length of each slot.
        begins: (rows + 1,) index of each row's first slot, and the number of slots.
    """

    lengths: NDArray[np.int64]
    begins: NDArray[np.int64]


def pack(lengths: NDArray[np.int64], capacity: int) -> Packing:
    """The packing by best fit decreasing: from the longest, each where the least room remains.

    Slices of one length are placed together, so that the work grows with the number of different
    lengths and not with the number of slices: millions take well under a second.

    Args:
        lengths: (slices,) each in [1, capacity], in any order.
    """
    # room left -> rows with that room: (lengths that such a row holds, number of such rows)
    bins: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    rooms: list[int] = []  # keys of `bins` with rows that have room, rising

    def put(room: int, held: tuple[int, ...], count: int) -> None:
        if room and not bins.get(room):
            insort(rooms, room)
        bins.setdefault(room, []).append((held, count))

    found, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            at = bisect_left(rooms, length)
            room, count = capacity, left
            held: tuple[int, ...] = ()
            if at < len(rooms):
                room = rooms[at]
                held, count = bins[room].pop()
                if not bins[room]:
                    del rooms[at]
            each = min(room // length, left)
            filled = min(count, left // each)
            left -= filled * each
            put(room - each * length, (*held, *[length] * each), filled)
            if held and filled < count:
                put(room, held, count - filled)
    kinds = [kind for alike in bins.values() for kind in alike]
    slots = [length for held, count in kinds for length in held * count]
    sizes = [len(held) for held, count in kinds for _ in range(count)]
    return Packing(np.array(slots, dtype=np.int64), np.cumsum([0, *sizes], dtype=np.int64))


def pack_in_order(lengths: NDArray[np.int64], capacity: int) -> Packing:
    """The packing that keeps the order: a row ends where the next slice does not fit."""
    ends = np.cumsum(lengths)
    begins = [0]
    while begins[-1] < len(lengths):
        before = int(ends[begins[-1] - 1]) if begins[-1] else 0
        begins.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return Packing(lengths, np.array(begins, dtype=np.int64))
