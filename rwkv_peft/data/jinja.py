"""A user's Jinja template, with the variables of Hugging Face chat templates."""

from collections.abc import Sequence
from functools import cached_property

from rwkv_peft.data.records import Piece, Turn, join_inputs
from rwkv_peft.errors import ConfigError, DataError


class JinjaTemplate:
    """A template from the text of a Jinja file.

    It is given `messages` (each with `role` and `content`) and `add_generation_prompt`, and runs in
    Jinja's sandbox. The turns are told apart by rendering one turn more at a time, so that the text
    of the first turns must not change when others follow.

    Raises:
        ConfigError: the text is not a Jinja template.
    """

    opening = ""

    def __init__(self, name: str, source: str) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name, self.source = name, source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"--template {name}: {error}") from error

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The end of an assistant's turn, with the next heading if that end is only whitespace."""
        pieces = self.render([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")])
        ends = [i for i, p in enumerate(pieces) if p.role == "assistant" and p.part == "end"]
        if not ends:
            return ()
        end = pieces[ends[0]].text
        return (end.strip() or end + pieces[ends[0] + 1].text.rstrip(),)

    def render(self, turns: Sequence[Turn]) -> list[Piece]:
        """The document of these turns.

        Raises:
            DataError: the template fails, or what a turn adds cannot be told from the others.
        """
        pieces: list[Piece] = []
        done = ""
        turns = join_inputs(turns)
        for i, turn in enumerate(turns):
            text = self._run(turns[: i + 1])
            if not text.startswith(done):
                raise DataError(
                    f"the template {self.name} rewrites earlier turns when turn {i + 1} is added, "
                    "so that turns cannot be told apart: write each turn the same wherever it is"
                )
            pieces += self._cut(
                text[len(done) :], turn, self._run(turns[:i], asks=True)[len(done) :]
            )
            done = text
        return [piece for piece in pieces if piece.text]

    def parse(self, text: str) -> list[Piece]:
        """Raises DataError, since a Jinja template cannot be read backwards."""
        raise DataError(
            f"the turns of a text cannot be found by the template {self.name}: give rows of "
            "messages, or --loss_mask none"
        )

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text after which the assistant's answer to these turns comes."""
        return self._run(join_inputs(turns), asks=True)

    def _cut(self, block: str, turn: Turn, asking: str) -> list[Piece]:
        said = turn.text.strip()
        start = len(asking) if turn.role == "assistant" and block.startswith(asking) else 0
        found = block.find(said, start)
        if found < 0:
            raise DataError(
                f"the template {self.name} changes the text of a turn of role '{turn.role}', so "
                "that it cannot be found again: write {{ message.content }} as it is"
            )
        start, end = (start or found), found + len(said)
        cuts = ((block[:start], "head"), (block[start:end], "body"), (block[end:], "end"))
        return [Piece(text, turn.role, part, turn.weight) for text, part in cuts]  # type: ignore[arg-type]

    def _run(self, turns: Sequence[Turn], *, asks: bool = False) -> str:
        from jinja2 import TemplateError

        messages = [{"role": t.role, "content": t.text.strip()} for t in turns]
        try:
            return self._template.render(messages=messages, add_generation_prompt=asks)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise DataError(f"the template {self.name} fails: {error}") from error


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
