"""How a benchmark ends."""

from collections.abc import Iterable
from pathlib import Path


def report(lines: Iterable[str], output: Path | None) -> None:
    """Prints the lines, and writes them to a file if asked."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


def report_as_found(head: Iterable[str], rows: Iterable[str], output: Path | None) -> None:
    """Reports a table whose rows take long, each also when it is found.

    A run that is cut off leaves what it found.
    """
    lines = list(head)
    for row in rows:
        print(row, flush=True)
        lines.append(row)
        if output:
            output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(lines, output)
