"""What a row of a data file becomes: a text, or turns with roles."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a dialogue says.

    Attributes:
        role: system, user, assistant, tool, or input (a text that the user's turn is about).
        weight: with which its tokens are trained, if the mask chooses them.
    """

    role: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """One document: `turns` if it has any, otherwise `text`.

    Attributes:
        form: the form of its row, such as text or messages.
        is_verbatim: its turns are laid end to end without a template.
        weight: with which all of its tokens are trained.
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
        """Whether there is no text in it."""
        return not self.text and not any(turn.text for turn in self.turns)
