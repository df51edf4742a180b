"""A layout: under which names and in which form another program keeps an official file's tensors.

Names are templates in which `{i}` is the number of the layer, such as `blocks.{i}.att.w1`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rwkv_peft.errors import CheckpointError
from rwkv_peft.exports.stored import Stored, mapped

# the number of a layer in a name, behind the word that every layout has for layers
_LAYER = re.compile(r"^((?:.*\.)?(?:blocks|layers|blk))\.(\d+)\.")


class Form(NamedTuple):
    """How the numbers of one or several official tensors lie in one foreign tensor.

    Attributes:
        to: the foreign tensor from the official ones; called with these and the layer's number.
        back: the official tensors; called with the foreign one, the layer's number and the head
            size. Views wherever numbers only lie otherwise.
        by_rows: whether `to` and `back` work on some rows alone.
    """

    to: Callable[[Sequence[Tensor], int], Tensor]
    back: Callable[[Tensor, int, int], Sequence[Tensor]]
    by_rows: bool = False


SAME = Form(lambda xs, i: xs[0], lambda x, i, n: (x,), by_rows=True)
TRANSPOSED = Form(lambda xs, i: xs[0].transpose(-2, -1), lambda x, i, n: (x.transpose(-2, -1),))
# (1, 1, D) and (D,)
VECTOR = Form(lambda xs, i: xs[0].reshape(-1), lambda x, i, n: (x.reshape(1, 1, -1),))
# (H, N) and (D,)
FLAT = Form(lambda xs, i: xs[0].reshape(-1), lambda x, i, n: (x.reshape(-1, n),))


class Rule(NamedTuple):
    """One foreign tensor.

    Attributes:
        official: the tensors that it is made of.
        foreign: its name.
        is_copy: it repeats what another rule holds too, and is not read back.
    """

    official: tuple[str, ...]
    foreign: str
    form: Form = SAME
    is_copy: bool = False


Rules: TypeAlias = tuple[Rule, ...]


def rule(official: str, foreign: str, form: Form = SAME) -> Rule:
    """The rule of a tensor that has a foreign one to itself."""
    return Rule((official,), foreign, form)


@dataclass(frozen=True)
class Layout:
    """The table of one format for one version.

    Attributes:
        rules: of the tensors that are renamed or lie otherwise.
        prefix: before the official names of all other tensors, if these keep their names; None if
            the format has no others.
        unread: official names that the format has no place for, and which nothing reads.
    """

    rules: Rules
    prefix: str | None = ""
    unread: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def _by_official(self) -> dict[str, list[Rule]]:
        found: dict[str, list[Rule]] = {}
        for entry in self.rules:
            for name in entry.official:
                found.setdefault(name, []).append(entry)
        return found

    @cached_property
    def _by_foreign(self) -> dict[str, Rule]:
        return {entry.foreign: entry for entry in self.rules}

    def to_foreign(self, official: Mapping[str, Stored]) -> dict[str, Stored]:
        """The foreign tensors, in the order of the official ones that they begin with.

        Raises:
            CheckpointError: the format has no place for a tensor, or one is missing.
        """
        found: dict[str, Stored] = {}
        for name in official:
            template, layer = to_template(name)
            if name in self.unread:
                continue
            for entry in self._rules_of(template, layer):
                foreign = _fill(entry.foreign, layer)
                if foreign not in found:
                    parts = [_fill(part, layer) for part in entry.official]
                    if lacking := [part for part in parts if part not in official]:
                        raise CheckpointError(f"{lacking[0]} is missing: the file is damaged")
                    found[foreign] = _join(entry.form, [official[part] for part in parts], layer)
        return found

    def to_official(
        self, foreign: Mapping[str, Stored], head_size: int, path: str | Path = "the file"
    ) -> dict[str, Stored]:
        """The official tensors of foreign ones.

        Args:
            path: of the file or folder, for messages.
        Raises:
            CheckpointError: the layout has no such tensor.
        """
        found: dict[str, Stored] = {}
        for name, stored in foreign.items():
            template, layer = to_template(name)
            entry = self._by_foreign.get(name) or self._by_foreign.get(template)
            if entry is None:
                if self.prefix is None or not name.startswith(self.prefix):
                    raise CheckpointError(f"{path}: {name} is no tensor of this format")
                entry = Rule((template.removeprefix(self.prefix),), template)
            if not entry.is_copy:
                parts = _part(entry.form, stored, layer, head_size)
                names = (_fill(part, layer) for part in entry.official)
                found |= dict(zip(names, parts, strict=True))
        return found

    def _rules_of(self, template: str, layer: int) -> list[Rule]:
        rules = self._by_official.get(template, [])
        # a rule of one layer names it
        rules = rules + self._by_official.get(_fill(template, layer), []) * ("{i}" in template)
        if not rules and self.prefix is not None:
            rules = [Rule((template,), self.prefix + template)]
        if not rules:
            raise CheckpointError(f"{_fill(template, layer)} has no place in this format")
        return rules


def to_template(name: str) -> tuple[str, int]:
    """A name with `{i}` for its layer, and the layer's number; 0 where there is none."""
    match = _LAYER.match(name)
    if match is None:
        return name, 0
    return f"{match[1]}.{{i}}.{name[match.end() :]}", int(match[2])


def _fill(template: str, layer: int) -> str:
    return template.replace("{i}", str(layer))


def _join(form: Form, parts: Sequence[Stored], layer: int) -> Stored:
    """The foreign tensor of official ones."""
    if form is SAME:
        return parts[0]
    if form.by_rows:
        (part,) = parts
        pieces = part.pieces
        return part._replace(pieces=lambda: (form.to([x], layer) for x in pieces()), tensor=None)
    like = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts]
    shape = tuple(form.to(like, layer).shape)

    def whole() -> tuple[Tensor]:
        return (form.to([part.whole() for part in parts], layer),)

    return Stored(shape, parts[0].dtype, whole)


def _part(form: Form, stored: Stored, layer: int, head_size: int) -> list[Stored]:
    """The official tensors of a foreign one."""
    if form is SAME:
        return [stored]
    if form.by_rows:
        pieces = stored.pieces
        own = lambda: (form.back(x, layer, head_size)[0] for x in pieces())  # noqa: E731
        return [stored._replace(pieces=own, tensor=None)]
    # such tensors are small, or mapped
    return [mapped(x) for x in form.back(stored.whole(), layer, head_size)]
