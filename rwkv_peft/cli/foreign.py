"""Flags of other programs, answered by meaning with the flags of this one."""

import re
from collections.abc import Collection, Iterator
from dataclasses import fields
from functools import cache

from rwkv_peft.assets import FOREIGN_FLAGS
from rwkv_peft.cli.legacy.methods import METHOD_FLAGS
from rwkv_peft.config import TrainConfig


def answer_foreign(name: str, known: Collection[str]) -> str:
    """What a flag of another program is called here; "" if it is known as none.

    Args:
        name: without dashes in front, with underscores inside, in any case.
        known: names of the command's own flags.
    """
    has = set(known)
    answers = _table().get(name.lower(), ())
    return next((x for x in answers if has.issuperset(re.findall(r"--(\w+)", x))), "")


def answer_training(name: str, known: Collection[str]) -> str:
    """What to say of a flag of training, of this program or another, where another command has it.

    Args:
        name: as for `answer_foreign`.
        known: names of the command's own flags.
    """
    flags = {field.name for field in fields(TrainConfig)}
    if flags <= set(known):
        return ""
    is_of_training = name in flags or name in METHOD_FLAGS or answer_foreign(name, flags)
    return "rwkv-peft train has what it sets: leave it out here" if is_of_training else ""


@cache
def _table() -> dict[str, tuple[str, ...]]:
    return dict(read_table())


def read_table() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each name of a flag elsewhere, with what there is to say of it."""
    for block in FOREIGN_FLAGS.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        answers = tuple(line[2:] for line in lines if line.startswith("> "))
        for line in lines:
            if not line.startswith("> "):
                yield from ((name, answers) for name in line.split())
