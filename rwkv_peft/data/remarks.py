"""What a person should know of rows that are trained nevertheless."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rwkv_peft.data.records import Record, Turn

# name of a remark -> what is said of the rows it is made of; caches hold the place in this order
REMARKS = {
    "blank_line": "with a blank line inside an answer, where some programs end it",
    "empty_answer": "with an empty answer, which teaches to say nothing",
    "no_last_answer": "whose dialogue does not end with the assistant",
    "answer_first": "whose dialogue begins with the assistant",
    "carriage_return": r"with \r\n as line ends, which texts keep and turns do not",
    "image": "with the mark of an image, such as <image>, trained as text",
    "preference": "of preference data (chosen and rejected, or label), trained like any other",
    "weight": "whose column weight is used",
    "state": "whose column state is used",
    "dialogue": (
        "that are plain texts with turns of User and Assistant, trained as a whole; --loss_mask "
        "qa trains the answers alone"
    ),
}
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_IMAGES = ("<image>", "<img>", "<|image|>", "<|image_1|>", "<|image_pad|>", "<|vision_start|>")


def find_remarks(row: object, record: Record, *, trains_all_text: bool) -> Iterator[str]:
    """The names of the remarks that a row and its record call for.

    Args:
        trains_all_text: whether all of a text without turns is trained unasked.
    """
    if isinstance(row, dict):
        yield from _look_at_columns(row, is_chosen=record.form == "sft")
    if record.turns:
        yield from _look_at_turns(record.turns, is_verbatim=record.is_verbatim)
    else:
        yield from look_at_text(record.text, trains_all_text=trains_all_text)


def look_at_text(text: str, *, trains_all_text: bool) -> Iterator[str]:
    """The names of the remarks that a plain text calls for."""
    if "\r\n" in text:
        yield "carriage_return"
    if _has_image(text):
        yield "image"
    if trains_all_text and text[:64].lstrip().startswith(("User:", "System:")):
        has_answer = any(f"{end}{end}Assistant:" in text for end in ("\n", "\r\n"))
        yield from ["dialogue"] * has_answer


def _look_at_columns(row: Mapping[str, Any], *, is_chosen: bool) -> Iterator[str]:
    """Columns that change or spoil what is learned; `is_chosen`: the user has named some."""
    has_label = str(row.get("label")).lower() in ("true", "false", "0", "1")
    has_two = {"chosen", "rejected"} <= row.keys() and not is_chosen
    if has_two or (has_label and "text" not in row):
        yield "preference"
    yield from (name for name in ("weight", "state") if row.get(name) is not None)


def _look_at_turns(turns: tuple[Turn, ...], *, is_verbatim: bool) -> Iterator[str]:
    said = [turn for turn in turns if turn.role != "system"]
    answers = [turn.text.strip() for turn in said if turn.role == "assistant"]
    if not is_verbatim and any(_BLANK_LINE.search(answer) for answer in answers):
        yield "blank_line"
    if not all(answers):
        yield "empty_answer"
    if said and said[-1].role != "assistant":
        yield "no_last_answer"
    if said and said[0].role == "assistant":
        yield "answer_first"
    if any("\r\n" in turn.text for turn in turns):
        yield "carriage_return"
    if any(_has_image(turn.text) for turn in turns):
        yield "image"


def _has_image(text: str) -> bool:
    # most texts hold no mark at all, and one look is cheaper than six
    return "<" in text and any(mark in text for mark in _IMAGES)
