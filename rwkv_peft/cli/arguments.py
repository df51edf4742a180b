"""Argument lists as flags with their words, and back."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

# a flag's name, without dashes in front and with underscores inside, and the words behind it
Flags = list[tuple[str, list[str]]]
# flags whose words are a list
LISTS = ("train_parts", "sft_field", "resume_changes", "report_to")
# flags that may stand without a word, of today and of older versions; a word that is none of the
# others belongs to no such flag
SWITCHES = {"dry_run", "force", "json", "check_fla", "ftfy"}
SWITCHES |= {"lora", "PISSA", "LISA", "state_tune", "fla", "emb"}
_SWITCHED = ("true", "false", "yes", "no", "1", "0")


class Translation(NamedTuple):
    """An argument list in today's flags.

    Attributes:
        notes: a line for each old flag that has no effect.
        model_flags: what a line of training says of the model; see `train.require_agreement`.
    """

    arguments: list[str]
    notes: list[str]
    model_flags: Mapping[str, str]


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], Flags]:
    """The arguments that belong to no flag, wherever they stand, and each flag with its words.

    JSON that a shell has split at its spaces is joined again. The name of a flag with one dash,
    of which there is none here, keeps that dash.
    """
    positional: list[str] = []
    flags: Flags = []
    words = iter([*arguments, None])
    word = next(words)
    while word is not None:
        if not _is_flag(word):
            positional.append(word)
            word = next(words)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_") if word.startswith("--") else name
        behind, word = [value] if equals else [], next(words)
        while word is not None and not _is_flag(word):
            if (equals and name not in LISTS) or not _takes(name, behind, word):
                break
            behind.append(word)
            word = next(words)
        flags.append((name, _join_json(name, behind)))
    return positional, flags


def join_arguments(
    positional: Sequence[str], flags: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    """The argument list that `split_arguments` takes apart."""
    return [*positional, *(word for name, words in flags for word in _write_flag(name, words))]


def _is_flag(word: str) -> bool:
    # - alone is standard input, -1 a number, and what has spaces a text
    return re.fullmatch(r"(--\w|-[^\W\d])[^\s=]*(=.*)?", word, re.DOTALL) is not None


def _takes(name: str, behind: Sequence[str], word: str) -> bool:
    """Whether a word belongs to a flag that has some words already."""
    if name in LISTS:
        return True
    if name in SWITCHES:
        return not behind and word.lower() in _SWITCHED
    # a flag of JSON ends with its last bracket
    is_open = _is_json(name, behind) and any(
        text.count(x) > text.count(y) for text in [" ".join(behind)] for x, y in ("{}", "[]")
    )
    return not behind or is_open


def _is_json(name: str, words: Sequence[str]) -> bool:
    is_named = name.endswith("_config") or name in ("weights", "stop")
    return is_named and bool(words) and words[0][:1] in ("{", "[")


def _write_flag(name: str, words: Sequence[str]) -> Iterator[str]:
    flag = name if name.startswith("-") else f"--{name}"
    # what begins with a dash would be taken for a flag
    if len(words) == 1 and words[0].startswith("-"):
        yield f"{flag}={words[0]}"
    else:
        yield from (flag, *words)


def _join_json(name: str, words: list[str]) -> list[str]:
    if name in LISTS:
        bare = [word.strip("[]\"' ") for word in " ".join(words).replace(",", " ").split()]
        return [json.dumps([word for word in bare if word], ensure_ascii=False)]
    return [" ".join(words)] if _is_json(name, words) else words
