"""What a save has written."""

from pathlib import Path
from typing import NamedTuple


class Saved(NamedTuple):
    """The files of a save, None where there is none, and what is to be said of them.

    Attributes:
        failure: why a file is not there that should be, and how it can be had later.
    """

    weights: Path | None
    adapter: Path | None
    remarks: tuple[str, ...] = ()
    failure: str = ""
