"""What is printed: the text of files shown harmlessly, in the language that was chosen.

Everything that a command prints goes through here. Control characters, with which a file could move
the cursor, recolour or rewrite what stands on a terminal, are shown as escapes, and so is what the
terminal's encoding lacks. Results that another program reads keep every character: answers of a
model in a pipe, and JSON, whose own escapes stand for the same text.
"""

import codecs
import io
import json
import os
import re
import sys
from typing import TextIO
from unicodedata import east_asian_width

from rwkv_peft.language import translate

# C0 and C1 controls, line separators, marks that reorder text, and halves of characters
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str, *, keeps: str = "") -> str:
    r"""The text with each control character as an escape, such as \x1b, but for those to keep."""
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in keeps else found[0].encode("unicode_escape").decode(),
        text,
    )


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: 1 epoch, 2 epochs; 1 batch, 2 batches."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def count_columns(text: str) -> int:
    """Columns of a text on a terminal, where a Chinese letter takes two."""
    return sum(1 + (east_asian_width(x) in "WF") for x in text)


def duration(seconds: float) -> str:
    """A time for a person: 42 s, 17 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{max(0, seconds):.0f} s"
    if minutes < 60:
        return f"{minutes:d} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours:d} h {rest:02d} min" if hours < 24 else f"{hours // 24:d} d {hours % 24:d} h"


def print_line(text: str, *, file: TextIO | io.TextIOBase | None = None) -> None:
    """Prints one line of the program's own words; on stdout if no file is given."""
    print(escape(translate(text)), file=file, flush=True)


def print_text(text: str, *, file: TextIO | io.TextIOBase | None = None) -> None:
    """Prints a text of the program that may have line breaks and tabs, and a line break."""
    print(escape(translate(text), keeps="\n\t"), file=file, flush=True)


def print_answer(text: str, *, is_dim: bool = False) -> None:
    """Prints a part of a model's answer: on a terminal with escapes, in a pipe as it is.

    Args:
        is_dim: whether a terminal is to show it faintly.
    """
    if not sys.stdout.isatty():
        print(text, end="", flush=True)
        return
    shown = escape(text, keeps="\n\t")
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    is_dim = is_dim and not is_plain
    print(f"\x1b[2m{shown}\x1b[0m" if is_dim and shown else shown, end="", flush=True)


def print_json(value: object) -> None:
    """Prints a value as one line of JSON, in ASCII if the encoding of stdout is not UTF-8."""
    encoding = codecs.lookup(sys.stdout.encoding or "ascii").name
    text = json.dumps(value, ensure_ascii=encoding != "utf-8")
    print(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def prepare_streams() -> None:
    """Makes stdout and stderr take every character, and stdin every byte; none of them lacks.

    What an encoding lacks is printed as an escape; bytes of stdin that are not in its encoding
    become lone surrogates, which no valid text holds.
    """
    for name, mode, errors in (
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
        ("stdin", "r", "surrogateescape"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            # Python's sign for a stream that was closed when the process began
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
