"""Ending a run early without losing it."""

import signal
from types import FrameType


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop; a second one stops at once.

    Attributes:
        signal: number of the signal that came, 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        except ValueError:
            # only the main thread may handle signals; elsewhere the caller's handling stays
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
