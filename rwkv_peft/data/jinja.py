"""A user's Jinja template, with what Hugging Face chat templates are given."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

from rwkv_peft.data.records import Piece, Turn, join_inputs
from rwkv_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jinja2 import Template

    from rwkv_peft.data.sandbox import LimitedEnvironment

# around what a generation block writes, until its place is noted; no valid text has halves of
# characters
OPEN, CLOSE = _MARKS = "\ud800", "\udfff"
# what a template may raise besides Jinja's own errors, by the Python that it is made of
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
# RWKV's end of document is a token without a text, which --append_eod puts behind a document
SPECIAL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")


class Rendered(NamedTuple):
    """A text, and the [start, end) of what its generation blocks wrote."""

    text: str
    generated: list[tuple[int, int]]


class JinjaTemplate:
    """A template from the text of a Jinja file.

    It runs in Jinja's sandbox. The turns are told apart by rendering one turn more at a time, so
    that the text of the first turns must not change when others follow. Of a template with
    `{% generation %}` blocks, what they write is the assistant's, and nothing else is.

    Raises:
        ConfigError: the text is not a Jinja template.
    """

    opening = ""

    def __init__(self, name: str, source: str) -> None:
        from jinja2 import TemplateError

        self.name, self.source = name, source
        try:
            self._template, self._has_blocks = _compile(source)
        except (TemplateError, SyntaxError, *_FAILURES) as error:
            raise ConfigError(f"--template {name}: {_tell(error)}") from error

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The end of an assistant's turn; with the next heading if that end is only white space."""
        ends = []
        for role in ("user", "tool", "system", "assistant"):
            turns = [Turn("user", "\ue000"), Turn("assistant", "\ue001"), Turn(role, "\ue002")]
            try:
                end = self._run(turns[:2]).text.partition("\ue001")[2]
                behind = self._run(turns).text.partition("\ue001")[2]
            except DataError:
                # there is no such role, or not in this place
                continue
            heading, said, _ = behind.removeprefix(end).partition("\ue002")
            if end.strip():
                ends.append(end.rstrip())
            elif said and heading.strip():
                ends.append((end + heading).rstrip())
        return tuple(dict.fromkeys(ends))

    def render(self, turns: Sequence[Turn]) -> list[Piece]:
        """The document of these turns.

        Raises:
            DataError: the template fails, or what a turn adds cannot be told from the others.
        """
        laid = self._lay(join_inputs(turns))
        if not self._has_blocks:
            return [piece for piece, _ in laid if piece.text]
        generated = self._run(join_inputs(turns)).generated
        return [part for piece, start in laid for part in _split(piece, start, generated)]

    def parse(self, text: str) -> list[Piece]:
        """Raises DataError, since a Jinja template cannot be read backwards."""
        raise DataError(
            f"the turns of a text cannot be found by the template {self.name}: give rows of "
            "messages, or --loss_mask none"
        )

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text after which the assistant's answer to these turns comes."""
        return self._run(join_inputs(turns), asks=True).text

    def _lay(self, turns: Sequence[Turn]) -> list[tuple[Piece, int]]:
        """The pieces of turns, and where each begins.

        A turn that the template refuses, or does not write, until the next one is there, such as a
        system turn that goes into the user's, is laid together with it.
        """
        laid: list[tuple[Piece, int]] = []
        done, num_laid = "", 0
        problem: DataError | None = None
        for i in range(len(turns)):
            try:
                text = self._run(turns[: i + 1]).text
                if not text.startswith(done):
                    raise DataError(
                        f"the template {self.name} rewrites earlier turns when turn {i + 1} is "
                        "added, so that turns cannot be told apart: write each turn the same "
                        "wherever it is"
                    )
                laid += self._cut(text, len(done), turns[: i + 1], num_laid)
            except DataError as error:
                problem = problem or error
                continue
            done, num_laid, problem = text, i + 1, None
        if problem is not None:
            raise problem
        return laid

    def _cut(
        self, text: str, start: int, turns: Sequence[Turn], num_laid: int
    ) -> Iterator[tuple[Piece, int]]:
        """The pieces of the turns after the first `num_laid`; their text begins at `start`."""
        cuts = []
        for i in range(num_laid, len(turns)):
            turn, said = turns[i], turns[i].text.strip()
            begin = start
            if turn.role == "assistant" and i:
                asking = self._ask(turns[:i])
                begin = len(asking) if text.startswith(asking) and len(asking) > start else start
            found = text.find(said, begin)
            if text.find(said, found + 1) > found >= 0:
                found = self._locate(text, turns[: i + 1], found)
            if found < 0:
                raise DataError(
                    f"the template {self.name} changes the text of a turn of role '{turn.role}', "
                    "so that it cannot be found again: write {{ message.content }} as it is"
                )
            # what follows the prompt is the assistant's, such as a thought that was left empty
            body, end = (begin if begin > start else found), found + len(said)
            cuts.append((turn, start, body, end))
            start = end
        for i, (turn, head, body, end) in enumerate(cuts, 1):
            last = len(text) if i == len(cuts) else end
            yield Piece(text[head:body], turn.role, "head", turn.weight), head
            yield Piece(text[body:end], turn.role, "body", turn.weight), body
            yield Piece(text[end:last], turn.role, "end", turn.weight), end

    def _ask(self, turns: Sequence[Turn]) -> str:
        try:
            return self._run(turns, asks=True).text
        except DataError:
            return ""

    def _locate(self, text: str, turns: Sequence[Turn], found: int) -> int:
        """Where the last turn's words begin, if they occur several times; `found` if not known."""
        said = turns[-1].text.strip()
        try:
            other = self._run([*turns[:-1], replace(turns[-1], text="\ue000")]).text
        except DataError:
            return found
        head = other.partition("\ue000")[0]
        is_there = len(head) < len(other) and text.startswith(head + said)
        return len(head) if is_there else found

    def _run(self, turns: Sequence[Turn], *, asks: bool = False) -> Rendered:
        from jinja2 import TemplateError

        messages = [{"role": t.role, "content": t.text.strip()} for t in turns]
        environment = cast("LimitedEnvironment", self._template.environment)
        environment.begin(sum(len(turn.text) for turn in turns))
        if any(mark in x for turn in turns for x in (turn.role, turn.text) for mark in _MARKS):
            raise DataError("a turn has half of a character (U+D800 or U+DFFF), which is no text")
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=asks,
                tools=None,
                documents=None,
                **SPECIAL_TOKENS,
            )
        except (TemplateError, *_FAILURES) as error:
            raise DataError(f"the template {self.name} fails: {_tell(error)}") from error
        return _unmark(text)


def _tell(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return (said if len(said) <= 300 else said[:300] + " …") or type(error).__name__


def _unmark(marked: str) -> Rendered:
    parts, opened, position = [], 0, 0
    generated: list[tuple[int, int]] = []
    for part in re.split(f"([{OPEN}{CLOSE}])", marked):
        if part == OPEN:
            opened = position
        elif part == CLOSE:
            generated.append((opened, position))
        else:
            parts.append(part)
            position += len(part)
    return Rendered("".join(parts), generated)


def _split(piece: Piece, start: int, generated: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """A piece cut at the borders of generation blocks.

    Outside of them it is at most what stands around an answer, which `--train_role_words` trains.
    """
    end = start + len(piece.text)
    for first, last in [*generated, (end, end)]:
        first, last = max(first, start), min(last, end)
        if first < last or first == end:
            around = "head" if piece.role == "assistant" else piece.part
            if start < first:
                yield piece._replace(text=piece.text[: first - start], part=around)
            if first < last:
                text = piece.text[first - start : last - start]
                yield piece._replace(text=text, role="assistant", part="body")
            piece, start = piece._replace(text=piece.text[last - start :]), last


def _compile(source: str) -> tuple["Template", bool]:
    """A template with what transformers' apply_chat_template offers it.

    Returns:
        the template, and whether it has generation blocks.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.runtime import Macro

    from rwkv_peft.data.sandbox import LimitedEnvironment

    blocks: list[int] = []

    class Generation(Extension):
        """Marks what stands between {% generation %} and {% endgeneration %}."""

        tags = {"generation"}  # noqa: RUF012 as Jinja has it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            blocks.append(line)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Macro) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if (len(indent) if isinstance(indent, str) else indent or 0) > 100:
            raise TemplateError("tojson takes an indent of at most 100")
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    # one time for a whole run, or a turn might be written anew in the next second
    now = datetime.now()
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now.strftime)
    return environment.from_string(source), bool(blocks)
