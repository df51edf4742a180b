"""Ending a run early without losing it."""

import signal
from types import FrameType

from rwkv_peft.errors import Stopped

# SIGHUP, which not every system has, comes when the terminal is closed
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupt:
    """Turns Ctrl-C, SIGTERM and SIGHUP into `Stopped`, or later into a wish to stop.

    The first raises `Stopped`, or is only noted once `defer` was called. After it Ctrl-C stops at
    once, and other signals change nothing: a terminal that closes, or `timeout`, may send two.

    Attributes:
        signal: number of the first signal that came, 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._is_deferred = False
        self._previous: dict[int, object] = {}

    def defer(self) -> None:
        """From now on there is something to save."""
        self._is_deferred = True

    def __enter__(self) -> "Interrupt":
        try:
            for number in SIGNALS:
                # nohup has the terminal's end ignored
                is_ignored = signal.getsignal(number) == signal.SIG_IGN
                if not (is_ignored and number != signal.SIGINT):
                    self._previous[number] = signal.signal(number, self._receive)
        except ValueError:
            # only the main thread may handle signals; elsewhere the caller's handling stays
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self.signal = not self.signal, self.signal or number
        # where Ctrl-C has ended a part of the work alone, such as an answer
        is_open = self.signal == signal.SIGINT and not self._is_deferred
        if not self._is_deferred if is_first else is_open or number == signal.SIGINT:
            raise Stopped(number)
