"""Ends a process when another of its run is lost, which it would wait for without end."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from rwkv_peft.printing import print_line

# seconds between two signs of life, and after which a rank without one is lost
INTERVAL, PATIENCE = 5.0, 60.0
# exit code of a rank that ends as another is lost; who started it says so
LOST_CODE = 70


class Watch:
    """A thread that gives signs of life and looks for those of the next rank, in a common store.

    Whoever finds one lost notes it there, and so ends all. What a rank waits for in a step needs no
    time limit then, and rank 0 may write a large file or a rank compile as long as it takes.
    """

    def __init__(
        self, connect: Callable[[], Any], rank: int, size: int, *, is_quiet: bool = False
    ) -> None:
        """Begins to watch.

        Args:
            connect: gives a `torch.distributed` store that this thread has for itself.
            is_quiet: who started this process tells the user what happened.
        """
        self._rank, self._next = rank, (rank + 1) % size
        self._is_quiet = is_quiet
        self._has_ended = threading.Event()
        self._store = connect()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        last, since, count = b"", time.monotonic(), 0
        try:
            while not self._has_ended.wait(INTERVAL if count else 0):
                count += 1
                self._store.set(f"alive/{self._rank}", str(count))
                if self._store.check(["lost"]):
                    self._end(self._store.get("lost").decode())
                    return
                if self._store.check([f"ended/{self._next}"]):
                    continue
                key = f"alive/{self._next}"
                found = self._store.get(key) if self._store.check([key]) else b""
                if found != last:
                    last, since = found, time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    reason = f"rank {self._next} gave no sign of life for {PATIENCE:.0f} s"
                    self._store.set("lost", reason)
                    self._end(reason)
        except RuntimeError:
            # the store's connection broke
            self._end("the process in which the ranks meet is gone")

    def close(self) -> None:
        """Ends watching, as this rank has come to its end."""
        self._has_ended.set()
        self._thread.join()
        self._store.set(f"ended/{self._rank}", "1")

    def wait_for(self, ranks: Iterable[int]) -> None:
        """Waits until these ranks have come to their end, as this process holds the store."""
        self._store.wait([f"ended/{rank}" for rank in ranks])

    def fail(self, reason: str) -> None:
        """Ends watching and has all other ranks end, for a reason."""
        self._has_ended.set()
        self._thread.join()
        self._store.set("lost", f"rank {self._rank}: {reason}")

    def _end(self, reason: str) -> None:
        if self._has_ended.is_set():
            return
        if not self._is_quiet:
            print_line(
                f"error: {reason}: the run ends on all ranks; --resume auto goes on from its last "
                "checkpoint",
                file=sys.stderr,
            )
        # the main thread may wait in a collective that nothing ends
        os._exit(LOST_CODE)
