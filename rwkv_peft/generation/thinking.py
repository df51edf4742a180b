"""Telling apart what a model thinks and what it says, as both are generated."""

from collections.abc import Iterable, Iterator

OPENING, CLOSING = "<think", "</think>"


def split_thoughts(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The same text in parts, each with whether it belongs to a thought, with its marks.

    The end of a part that may yet become a mark waits for the next piece.
    """
    held, is_thought = "", False
    for piece in pieces:
        held += piece
        while (mark := CLOSING if is_thought else OPENING) in held:
            place = held.index(mark) + len(mark) * is_thought
            if place:
                yield held[:place], is_thought
            held, is_thought = held[place:], not is_thought
        kept = next((n for n in range(len(mark) - 1, 0, -1) if held.endswith(mark[:n])), 0)
        if settled := held[: len(held) - kept]:
            yield settled, is_thought
            held = held[len(settled) :]
    if held:
        yield held, is_thought
