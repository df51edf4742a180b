"""Argument lists as flags with their words, and back."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# a flag's name, without dashes in front and with underscores inside, and the words behind it
Flags = list[tuple[str, list[str]]]
# flags whose words are a list
LISTS = ("train_parts", "sft_field", "resume_changes", "report_to")


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
    """The arguments before the first flag, and each flag with the words behind it.

    JSON that a shell has split at its spaces is joined again.
    """
    positional: list[str] = []
    flags: Flags = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(argument)
        else:
            positional.append(argument)
    return positional, [(name, _join_json(name, words)) for name, words in flags]


def join_arguments(
    positional: Sequence[str], flags: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    """The argument list that `split_arguments` takes apart."""
    return [*positional, *(word for name, words in flags for word in (f"--{name}", *words))]


def _join_json(name: str, words: list[str]) -> list[str]:
    if name in LISTS:
        bare = [word.strip("[]\"' ") for word in " ".join(words).replace(",", " ").split()]
        return [json.dumps([word for word in bare if word], ensure_ascii=False)]
    return [" ".join(words)] if words and words[0].startswith("{") else words
