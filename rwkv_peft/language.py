"""The language of what is said: English, or one that has a catalogue.

The program is written in English: errors, choices and logs stay so for whoever reads them from
Python or from a file. What is shown to a person is translated where it is printed, by the message
of the catalogue that has its words. In a message `{0}`, `{1}` … stand for what changes, `{#0}` for
a number. In its translation `{0}` is what stood there, translated too if it is a message of two
words and more; `{+0}` also if it is a word, and `{=0}` never, as it is the text of a user.

The catalogues are those of gettext: `rwkv_peft.po` is edited, and `msgfmt` makes the `rwkv_peft.mo`
beside it, which is read. `python tests/messages.py` prints the messages that a catalogue lacks.
"""

import gettext
import locale
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from rwkv_peft.assets import LOCALES
from rwkv_peft.errors import ConfigError

LANGUAGES = ("en", "zh")
# environment variables that name a language, the first that is set
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")
_DOMAIN = "rwkv_peft"
_HOLE = re.compile(r"\{([#=+]?)(\d+)\}")
_NUMBER = r"([-+]?(?:[\d,.]*\d(?:e[-+]?\d+)?|nan|inf)%?)"
# between messages of one line, and as Chinese writes them
_MARKS = {": ": "：", "; ": "；", ", ": "，"}
_MARK = re.compile("[:;,] ")
# of marks, above which a text is a list and not several messages
_MANY = 20
# letters, above which a text is none of ours
_LONG = 4000


def translate(text: str) -> str:
    """What is said, in the language that was chosen; as it is where no message fits."""
    return _catalogue.read(text).said if _catalogue else text


def choose_language(name: str = "") -> None:
    """Takes a language for all that is said from now on.

    Args:
        name: of LANGUAGES, or as in zh_CN; that of the environment if empty.
    Raises:
        ConfigError: there is no catalogue of it.
    """
    global _catalogue, _chosen
    code = name.replace("-", "_").partition("_")[0].lower() or find_language(os.environ)
    if code not in LANGUAGES:
        raise ConfigError(f"--lang {name}: allowed is {', '.join(LANGUAGES)}")
    _catalogue, _chosen = Catalogue(code) if code != "en" else None, code


def chosen_language() -> str:
    """That of all that is said now, one of LANGUAGES."""
    return _chosen


def find_language(environment: Mapping[str, str]) -> str:
    """The language of the environment, if it has a catalogue and the terminal its characters."""
    named = next((environment[n] for n in VARIABLES if environment.get(n)), "")
    if not named and sys.platform == "win32":
        named = locale.getlocale()[0] or ""
    if named not in ("", "C", "POSIX"):
        # goes before the others, and may name several
        known = (x for x in environment.get("LANGUAGE", "").split(":") if x[:2] in LANGUAGES)
        named = next(known, named)
    code = "zh" if named.lower().startswith(("zh", "chinese")) else "en"
    try:
        "中".encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "en"
    return code


class Message:
    """A message of a catalogue, with what it says there.

    Attributes:
        size: letters of its own words.
    """

    def __init__(self, text: str, said: str) -> None:
        # words, then of each hole its kind, its number, and the words behind it
        self._words, *self._rest = _HOLE.split(text)
        words = [self._words, *self._rest[2::3]]
        self._longest, self._said = max(words, key=len), said
        self.size = sum(map(len, words))

    def match(self, text: str) -> tuple[str, ...] | None:
        """What stands in a text where the message has its holes; None if it is another text."""
        found = self._form.fullmatch(text) if self._longest in text else None
        return found and found.groups()

    @cached_property
    def _form(self) -> re.Pattern[str]:
        pattern = re.escape(self._words)
        for kind, words in zip(self._rest[::3], self._rest[2::3], strict=True):
            pattern += (_NUMBER if kind else "(.*?)") + re.escape(words)
        return re.compile(pattern, re.DOTALL)

    def read(self, values: Sequence[str], catalogue: "Catalogue") -> "Reading":
        """What it says of these."""
        size = self.size

        def fill(hole: re.Match[str]) -> str:
            nonlocal size
            value = values[int(hole[2])]
            # the text of a user is understood too
            said, known = (
                (value, len(value))
                if hole[1] == "="
                else catalogue.read(value, is_word=hole[1] == "+")
            )
            size += known
            return said

        said = _HOLE.sub(fill, self._said)
        return Reading(said, size)


class Reading(NamedTuple):
    """A text translated, and how many of its letters are words of messages."""

    said: str
    size: int


class Catalogue:
    """The messages of a language.

    A text is read in the way in which most of its letters are words of messages.
    """

    def __init__(self, code: str) -> None:
        translation = gettext.translation(_DOMAIN, LOCALES, [code])
        # of the class that reads a compiled catalogue, which offers no list of its messages
        self._known: Mapping[str, str] = translation._catalog  # type: ignore[attr-defined]
        self._messages = [Message(x, y) for x, y in self._known.items() if _HOLE.search(x)]
        self._found: dict[str, Reading] = {}

    def read(self, text: str, *, is_word: bool = False) -> Reading:
        """The translation of a text, whole or of the messages that stand in it one by one.

        Args:
            is_word: whether the text may be a message of one word.
        """
        if text in self._known and (is_word or " " in text):
            return Reading(self._known[text], len(text))
        if " " not in text:
            return Reading(text, 0)
        if text not in self._found:
            self._found[text] = max(self._readings(text), key=lambda x: x.size)
        return self._found[text]

    def _readings(self, text: str) -> Iterator[Reading]:
        marks = list(_MARK.finditer(text))
        for mark in marks if len(marks) <= _MANY else ():
            yield from self._split(text, mark)
        for message in self._messages if len(text) <= _LONG else ():
            if (values := message.match(text)) is not None:
                yield message.read(values, self)
        # a name before a message, or the space before a line
        name, space, rest = text.partition(" ")
        if not name or rest in self._known:
            said, size = self.read(rest)
            yield Reading(name + space + said, size)
        yield Reading(text, 0)

    def _split(self, text: str, mark: re.Match[str]) -> Iterator[Reading]:
        """The text translated on both sides of a mark, to which a message may belong."""
        head = self.read(text[: mark.start()])
        tail = self.read(text[mark.end() :])
        if head.size + tail.size:
            between = _MARKS[mark[0]] if head.size and tail.size else mark[0]
            yield Reading(head.said + between + tail.said, head.size + tail.size)
        if mark.start() and (tail := self.read(text[mark.start() :])).size:
            yield Reading(head.said + tail.said, head.size + tail.size)


_catalogue: Catalogue | None = None
_chosen = "en"
