"""Files that are written while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import NamedTuple

from rwkv_peft.errors import CheckpointError, RwkvPeftError
from rwkv_peft.training.saved import Saved


class Finished(NamedTuple):
    """A save that is written, with the loss and the step of the run when it was begun."""

    saved: Saved
    loss: float
    step: int


class Aside:
    """At most one save that a thread is writing."""

    def __init__(self) -> None:
        self._writing: Future[Finished] | None = None

    def begin(self, write: Callable[[], Saved], loss: float, step: int) -> None:
        """Has a thread write what was copied aside; the one before must have been collected."""
        assert self._writing is None
        self._writing = Future()
        given = self._writing, write, loss, step
        Thread(target=_work, args=given, daemon=True).start()

    @property
    def is_writing(self) -> bool:
        """Whether a save was begun that has not been collected."""
        return self._writing is not None

    def collect(self, *, waits: bool) -> Finished | None:
        """The save that was written since the last call, if any.

        Args:
            waits: for one that is not yet.
        Raises:
            RwkvPeftError: it could not be written.
        """
        writing = self._writing
        if writing is None or not (waits or writing.done()):
            return None
        # what interrupts the waiting does not make the files less wanted
        finished = writing.result()
        self._writing = None
        return finished

    def __enter__(self) -> "Aside":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # who presses Ctrl-C twice waits for nothing
        if self._writing and isinstance(error, Exception):
            with suppress(RwkvPeftError):
                self._writing.result()


def _work(future: "Future[Finished]", write: Callable[[], Saved], loss: float, step: int) -> None:
    try:
        future.set_result(Finished(write(), loss, step))
    except OSError as error:
        message = f"cannot write {error.filename or 'what was learned'}: {error.strerror}"
        future.set_exception(CheckpointError(message))
    except RwkvPeftError as error:
        future.set_exception(error)
    finally:
        # whatever it was, nobody waits for ever
        if not future.done():
            future.set_exception(CheckpointError("what was learned could not be written"))
