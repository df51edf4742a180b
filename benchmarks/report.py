"""How a benchmark ends."""

from collections.abc import Iterable
from pathlib import Path


def report(lines: Iterable[str], output: Path | None) -> None:
    """Prints the lines, and writes them to a file if asked."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")
