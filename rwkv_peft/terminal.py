"""Output to a terminal, a pipe or a file that may close or fill up at any time."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO


class Unbreakable(io.TextIOBase):
    """A text stream, of which what cannot be written is dropped.

    A closed pipe (`| head -1`), a full disk (`2> log`), a terminal that is gone, and no stream at
    all (`2>&-`) lose the text and nothing else.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        # a stream that was closed is a ValueError
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """The descriptor of the stream."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Whether writing is allowed: always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"


@contextmanager
def keep_going() -> Iterator[None]:
    """Makes stdout and stderr streams whose end or failure ends nothing else."""
    with redirect_stdout(Unbreakable(sys.stdout)), redirect_stderr(Unbreakable(sys.stderr)):
        yield


@contextmanager
def whole_process() -> Iterator[None]:
    """Lets a process go on without stderr, and exit as it would have.

    A stdout that breaks is an error of the command, unless it uses `keep_going`.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # closed (`2>&-`): the next file that is opened would take its place, and with it what
            # libraries print
            os.open(os.devnull, os.O_RDWR)
    try:
        with redirect_stderr(Unbreakable(sys.stderr)):
            yield
    finally:
        drop_unwritten(sys.stderr)


def drop_unwritten(stream: TextIO | None) -> None:
    """Empties the buffer of a stream that broke, of which the interpreter's end would make 120."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
