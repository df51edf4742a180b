"""Which lengths share a row: bins of one size, filled as well as can be."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packing(NamedTuple):
    """Rows as runs of slots; a slot takes one piece of its length.

    Attributes:
        lengths: (slots,) length of each.
        begins: (rows + 1,) the first slot of each row, and the end.
    """

    lengths: NDArray[np.int64]
    begins: NDArray[np.int64]


def pack(lengths: NDArray[np.int64], capacity: int) -> Packing:
    """Best fit decreasing: each length, from the largest, where the least room remains.

    Pieces of one length are placed together, so that the work grows with the number of different
    lengths and not of pieces: millions take well under a second.

    Args:
        lengths: (pieces,) each in [1, capacity], in any order.
    """
    # room left -> bins with that room: what each holds, and how many they are
    bins: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    rooms: list[int] = []  # those of `bins` that are not used up, rising

    def put(room: int, pieces: tuple[int, ...], count: int) -> None:
        if room and not bins.get(room):
            insort(rooms, room)
        bins.setdefault(room, []).append((pieces, count))

    found, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            at = bisect_left(rooms, length)
            room, count = capacity, left
            pieces: tuple[int, ...] = ()
            if at < len(rooms):
                room = rooms[at]
                pieces, count = bins[room].pop()
                if not bins[room]:
                    del rooms[at]
            each = min(room // length, left)
            filled = min(count, left // each)
            left -= filled * each
            put(room - each * length, (*pieces, *[length] * each), filled)
            if pieces and filled < count:
                put(room, pieces, count - filled)
    kinds = [kind for alike in bins.values() for kind in alike]
    slots = [length for pieces, count in kinds for length in pieces * count]
    sizes = [len(pieces) for pieces, count in kinds for _ in range(count)]
    return Packing(np.array(slots, dtype=np.int64), np.cumsum([0, *sizes], dtype=np.int64))


def pack_in_order(lengths: NDArray[np.int64], capacity: int) -> Packing:
    """Rows that keep the order of the pieces: each ends where the next piece does not fit."""
    ends = np.cumsum(lengths)
    begins = [0]
    while begins[-1] < len(lengths):
        before = int(ends[begins[-1] - 1]) if begins[-1] else 0
        begins.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return Packing(lengths, np.array(begins, dtype=np.int64))
