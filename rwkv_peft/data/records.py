"""What a row of a data file becomes: a text, or turns with roles; and the pieces of its text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says in one turn of a dialogue.

    Attributes:
        role: system, user, assistant, tool, or input (a text that the user's turn is about).
        weight: loss weight of its tokens, if the mask chooses them.
    """

    role: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """One document: `turns` if it has any, otherwise `text`.

    Attributes:
        form: the form of its row, such as text or messages.
        is_verbatim: whether its turns are laid end to end without a template.
        weight: loss weight of all of its tokens.
        state: name of the state that it trains, "" for none.
    """

    form: str
    text: str = ""
    turns: tuple[Turn, ...] = ()
    is_verbatim: bool = False
    weight: float = 1.0
    state: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether it has no text."""
        return not self.text and not any(turn.text for turn in self.turns)


class Piece(NamedTuple):
    """A part of a document's text: a turn's heading, its words, or its end.

    Attributes:
        role: role of the turn, "" for text outside of turns.
        weight: loss weight of its tokens, if the mask chooses them.
    """

    text: str
    role: str
    part: Literal["head", "body", "end"]
    weight: float = 1.0


def join_inputs(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with each input joined to the turn before it, for templates without that role."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == "input" and joined:
            joined[-1] = replace(joined[-1], text=f"{joined[-1].text}\n{turn.text}")
        else:
            joined.append(turn)
    return joined


def name_type(value: object) -> str:
    """What a value of a row is, in the words of a message."""
    if isinstance(value, float) and math.isnan(value):
        return 'NaN, which pandas writes for nothing: use null or ""'
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
