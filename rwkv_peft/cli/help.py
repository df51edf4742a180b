"""Help of a command, from the fields of its options and what is written under them."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rwkv_peft.language import translate
from rwkv_peft.printing import count_columns

WIDEST = 100
# of choices that stand behind the flag itself
CHOICES = 60


def describe_options(options: type[Any], command: str, positional: Sequence[str]) -> str:
    """The help of a command: its line, and each flag with its meaning, values and default."""
    width = min(WIDEST, max(40, get_terminal_size((WIDEST, 24)).columns - 1))
    words = " ".join([f"rwkv-peft {command}", *(f"[{p.upper()}]" for p in positional), "[flags]"])
    about = translate(inspect.getdoc(options) or "")
    lines = [translate(f"usage: {words}"), "", about, ""]
    lines += ["  --config FILE", translate("      YAML file of the names below.")]
    hints, texts = get_type_hints(options), field_texts(options)
    # what may stand without its flag is what a person needs first
    for item in sorted(fields(options), key=lambda x: x.name not in positional):
        shown = _placeholder(hints[item.name])
        lines.append(f"  --{item.name} {shown}".rstrip())
        text = translate(" ".join(texts.get(item.name, "").split()))
        notes = _describe_choices(hints[item.name], shown) + _describe_default(item)
        text += translate(f" ({'; '.join(notes)})") if notes else ""
        lines += (" " * 6 + line for line in wrap(text, width - 6))
    return "\n".join(lines)


def wrap(text: str, width: int) -> Iterator[str]:
    """The lines of a text; a Chinese one breaks between its letters, which are two columns wide."""
    line, used = "", 0
    # no line begins with a mark that ends something, nor ends with one that begins something
    form = r"[（“]*(?:[⺀-鿿]|[^\s⺀-鿿，。；：！？）、”（“]+)[，。；：！？）、”]*|\s+|."
    for piece in re.findall(form, text):
        size = count_columns(piece)
        if used + size > width and line:
            yield line.rstrip()
            line, used = "", 0
        if line or not piece.isspace():
            line, used = line + piece, used + size
    yield line.rstrip()


def field_texts(options: type[Any]) -> Mapping[str, str]:
    """What is written under each field of a dataclass, and of those that it extends."""
    found: dict[str, str] = {}
    for owner in reversed(options.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                found[ast.unparse(field.target)] = str(below.value.value)  # type: ignore[attr-defined]
    return found


def describe_type(hint: Any) -> str:
    """The values of a field's type, in words."""
    if get_origin(hint) is Literal:
        return ", ".join(str(value) for value in get_args(hint) if value != "")
    if args := [a for a in get_args(hint) if a is not type(None)]:
        if get_origin(hint) is dict:
            return "JSON in braces such as '{\"r\": 8}'"
        if get_origin(hint) in (list, tuple):
            return f"a list of {_PLURAL.get(args[0]) or describe_type(args[0])}"
        return " or ".join(map(describe_type, args))
    return _PLAIN.get(hint, Path(str(hint)).name)


_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}


def _placeholder(hint: Any) -> str:
    args = [a for a in get_args(hint) if a is not type(None)]
    if get_origin(hint) is Literal:
        choices = "|".join(map(str, args))
        return choices if len(choices) <= CHOICES else "NAME"
    if get_origin(hint) is dict:
        return "JSON"
    if get_origin(hint) in (list, tuple):
        return "A B …"
    if args:
        return _placeholder(args[0])
    return {int: "N", float: "X", str: "TEXT"}.get(hint, "")


def _describe_choices(hint: Any, shown: str) -> list[str]:
    """The values of a flag where its placeholder does not say them."""
    is_several = len([a for a in get_args(hint) if a is not type(None)]) > 1
    is_plain = get_origin(hint) in (dict, list, tuple) or "|" in shown
    return [describe_type(hint)] if is_several and not is_plain else []


def _describe_default(item: "Field[Any]") -> list[str]:
    if item.default is None:
        return ["chosen if left out"]
    if item.default is MISSING or item.default == "" or item.default is False:
        return []
    return [f"default {item.default}"]
