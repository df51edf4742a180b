"""Readers of data files: each gives records of text with the line they came from."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_peft.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One document.

    Attributes:
        text: the whole document.
        line: its line in the file, from 1.
    """

    text: str
    line: int


def read_jsonl(path: str | Path) -> Iterator[Record]:
    """The documents of a file of one {"text": ...} a line; blank lines are passed over.

    Raises:
        DataError: a line is not UTF-8, not JSON, or has no text; the message has file:line.
    """
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if not raw.strip():
                continue
            yield Record(_text_of(raw, f"{path}:{line}"), line)


def _text_of(raw: bytes, where: str) -> str:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); every line must be like "
            '{"text": "..."}'
        ) from error
    if not isinstance(row, dict) or "text" not in row:
        found = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f'{where}: no "text" (found {found}); every line must be {{"text": "..."}}')
    if not isinstance(row["text"], str):
        raise DataError(f'{where}: "text" is a {type(row["text"]).__name__}, it must be a string')
    return row["text"]
