"""Templates: from turns to the pieces of a text, and from a text back to its pieces."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from rwkv_peft.data.records import Piece, Turn, join_inputs
from rwkv_peft.errors import ConfigError, DataError

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


class Template(Protocol):
    """How a dialogue is written."""

    @property
    def name(self) -> str:
        """The value of --template that names it."""

    @property
    def opening(self) -> str:
        """What an answer begins with; the model gets it as the end of the prompt."""

    @property
    def stops(self) -> "Sequence[str | Headings]":
        """What ends an answer: texts, or a heading after a blank line."""

    def render(self, turns: Sequence[Turn]) -> list[Piece]:
        """The document of these turns."""

    def parse(self, text: str) -> list[Piece]:
        """The pieces of a text that was written in this template; joined, they give the text."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text after which the assistant's answer to these turns comes."""


class Frame(NamedTuple):
    """What stands around the words of a role: `head`, `space`, then the words."""

    head: str
    space: str = " "
    # whether blank lines are taken out of the words, since a blank line ends a turn
    has_no_blank_line: bool = False


class Headings:
    """Where turns begin in a text, whether it is read or being generated: one rule for both.

    A heading counts after a blank line alone, and at the start of a text that is read.

    Args:
        heads: whole headings, such as "User:".
    """

    def __init__(self, heads: Iterable[str]) -> None:
        words = sorted(heads, key=len, reverse=True)
        self._head = re.compile("(?P<head>" + "|".join(map(re.escape, words)) + ")")
        beginnings = {word[:length] for word in words for length in range(1, len(word))}
        beginning = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True)))
        self._begun = re.compile(rf"\n[ \t\r]*(?:\n\s*(?:{beginning})?)?\Z")

    def find_all(self, text: str) -> list[re.Match[str]]:
        """The headings of a whole text, each as the group `head`."""
        return [head for _, head in self._find(text, from_start=True)]

    def find_end(self, text: str) -> int:
        """Where a generated turn ends, before the blank line of a heading; -1: nowhere yet."""
        return next((start for start, _ in self._find(text, from_start=False)), -1)

    def _find(self, text: str, *, from_start: bool) -> Iterator[tuple[int, re.Match[str]]]:
        """Each heading, and where the white space before it that makes it one begins.

        Looks from each heading back over white space, and so at each character at most twice: a
        pattern that began with white space would look at all of it from each of its places.
        """
        last = 0
        for head in self._head.finditer(text):
            end = start = head.start()
            while start > last and text[start - 1].isspace():
                start -= 1
            blank = _BLANK_LINE.search(text, start, end)
            if blank or (from_start and start == 0):
                yield (blank.start() if blank else 0), head
                last = head.end()

    def count_settled(self, text: str) -> int:
        """Number of characters that no text behind them can make part of a turn's end."""
        begun = self._begun.search(text)
        return begun.start() if begun else len(text)

    def trim_last(self, text: str) -> str:
        """The unsettled end of a turn that is over, without the white space that ends a turn."""
        return text.rstrip()


@dataclass(frozen=True)
class Framed:
    """A template with a fixed heading for each role; a blank line ends a turn.

    Attributes:
        frames: role -> its heading.
        preface: what a dialogue without a system turn begins with: the first text, or the second if
            it has an input.
        adds_empty_thought: whether an answer without a thought gets an empty one.
    """

    name: str
    frames: Mapping[str, Frame]
    opening: str = ""
    preface: tuple[str, str] = ("", "")
    adds_empty_thought: bool = False

    @property
    def stops(self) -> tuple[Headings]:
        """The headings: a turn ends in generation where it ends in a text that is read."""
        return (self._headings,)

    def render(self, turns: Sequence[Turn]) -> list[Piece]:
        """The document of these turns; each, the last one too, ends with a blank line."""
        pieces = []
        if self.preface[0] and (not turns or turns[0].role != "system"):
            preface = self.preface[any(turn.role == "input" for turn in turns)]
            pieces += [Piece(preface, "system", "body"), Piece("\n\n", "system", "end")]
        for turn in turns if "input" in self.frames else join_inputs(turns):
            if turn.role not in self.frames:
                raise DataError(
                    f"the template {self.name} has no role '{turn.role}', only "
                    + ", ".join(self.frames)
                )
            frame, text = self.frames[turn.role], self._clean(turn)
            pieces.append(Piece(frame.head, turn.role, "head", turn.weight))
            if text:
                pieces.append(Piece(frame.space + text, turn.role, "body", turn.weight))
            pieces.append(Piece("\n\n", turn.role, "end", turn.weight))
        return [piece for piece in pieces if piece.text]

    def parse(self, text: str) -> list[Piece]:
        """The pieces of a text; a heading counts only at its start or after a blank line."""
        pieces = []
        heads = self._headings.find_all(text)
        borders = [*(match.start("head") for match in heads), len(text)]
        pieces.append(Piece(text[: borders[0]], "", "body"))
        for match, end in zip(heads, borders[1:], strict=True):
            role, said = self._role_of[match["head"]], text[match.end("head") : end]
            body = said.rstrip()
            pieces.append(Piece(match["head"], role, "head"))
            pieces += [Piece(body, role, "body"), Piece(said[len(body) :], role, "end")]
        return [piece for piece in pieces if piece.text]

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text after which the assistant's answer to these turns comes."""
        text = "".join(piece.text for piece in self.render(turns))
        # no space at the end: the tokenizer would not join it to the answer's first word
        return text + self.frames["assistant"].head + self.opening

    def _clean(self, turn: Turn) -> str:
        text = turn.text.replace("\r\n", "\n").strip()
        if self.frames[turn.role].has_no_blank_line:
            text = re.sub(r"\n(?:[ \t]*\n)+", "\n", text)
        if self.adds_empty_thought and turn.role == "assistant" and not text.startswith("<think>"):
            text = f"<think>\n</think>\n{text}"
        return text

    @cached_property
    def _role_of(self) -> dict[str, str]:
        return {frame.head: role for role, frame in self.frames.items() if frame.head}

    @cached_property
    def _headings(self) -> Headings:
        return Headings(self._role_of)


_CHAT = Framed(
    name="chat",
    frames={
        "system": Frame("System:", has_no_blank_line=True),
        "user": Frame("User:", has_no_blank_line=True),
        "assistant": Frame("Assistant:"),
        "tool": Frame("User: Function output:\n", "", has_no_blank_line=True),
    },
)
# chat, think, function and document: RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt
# alpaca: the prompt of Stanford Alpaca, which RWKV-PEFT has always used for sft data
TEMPLATES: dict[str, Template] = {
    "chat": _CHAT,
    "think": replace(_CHAT, name="think", opening=" <think", adds_empty_thought=True),
    "function": replace(_CHAT, name="function", opening=" ```json"),
    "document": Framed(
        name="document",
        frames={
            "system": Frame("System:", has_no_blank_line=True),
            "user": Frame("Instruction:", has_no_blank_line=True),
            "input": Frame("Input:", has_no_blank_line=True),
            "assistant": Frame("Response:"),
        },
    ),
    "alpaca": Framed(
        name="alpaca",
        frames={
            "system": Frame("", ""),
            "user": Frame("### Instruction:\n", ""),
            "input": Frame("### Input:\n", ""),
            "assistant": Frame("### Response:\n", ""),
        },
        preface=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.",
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.",
        ),
    ),
}


def find_template(name: str) -> Template:
    """The template of a name in TEMPLATES, or of a Jinja file.

    Raises:
        ConfigError: there is no such template or file, or the file is not a template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--template {name}: allowed is {', '.join(TEMPLATES)}, or a Jinja file, and there is "
            "no such file"
        )
    from rwkv_peft.data.jinja import JinjaTemplate

    try:
        return JinjaTemplate(name, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--template {name}: byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from error


def lay_verbatim(turns: Sequence[Turn]) -> list[Piece]:
    """The turns end to end without any heading; each is one body."""
    return [Piece(turn.text, turn.role, "body", turn.weight) for turn in turns if turn.text]
