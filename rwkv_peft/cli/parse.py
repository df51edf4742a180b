"""From an argument list to a dataclass, with errors of one line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rwkv_peft.cli.arguments import SWITCHES, Flags, join_arguments, split_arguments
from rwkv_peft.cli.foreign import answer_foreign, answer_training
from rwkv_peft.cli.help import describe_options, describe_type
from rwkv_peft.config import require_finite
from rwkv_peft.errors import ConfigError
from rwkv_peft.guard import require_paths
from rwkv_peft.printing import print_text
from rwkv_peft.yaml_file import read_yaml

T = TypeVar("T")
# unknown flags that are answered at once
NAMED = 6


def parse(
    options: type[T],
    args: Sequence[str],
    *,
    command: str,
    positional: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """An instance of the dataclass `options` from flags named like its fields.

    A flag may be spelled with dashes or underscores, and that of a bool without a value means true;
    `--config file.yaml` gives values that flags overrule; arguments that belong to no flag,
    wherever they stand, fill those of the fields named in `positional` that no flag gives.

    Args:
        defaults: take the place of the fields' own; names that are no fields are left out.
    Raises:
        ConfigError: a flag, key or value is not allowed.
    """
    if any(word in ("-h", "--help") for word in args):
        print_text(describe_options(options, command, positional))
        raise SystemExit(0)
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=f"rwkv-peft {command}",
        exit_on_error=False,
        default_env=False,
        # --device is no short form of --devices, nor --lr of three flags
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below.")
    parser.add_class_arguments(options)
    names = {f.name for f in fields(options)}  # type: ignore[arg-type]
    parser.set_defaults({n: x for n, x in (defaults or {}).items() if n in names})
    _check_files(args)
    flags = _name_loose(args, options, positional, command) + split_arguments(args)[1]
    try:
        values = parser.parse_args(join_arguments((), _complete_switches(flags, options)))
    except (jsonargparse.ArgumentError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(str(error), options)) from error
    given = options(**{f.name: values[f.name] for f in fields(options)})  # type: ignore[arg-type]
    require_finite(given)
    require_paths(given)
    return given


def _check_files(args: Sequence[str]) -> None:
    """Raises ConfigError if a file of --config is no YAML, or more of it than settings are."""
    for word, following in zip(args, [*args[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        path = value if equals else following
        # what was translated from an old file comes as JSON, which may be too long for a name
        if flag == "--config" and not path.startswith("{") and Path(path).is_file():
            read_yaml(path)


def _complete_switches(flags: Flags, options: type[Any]) -> Flags:
    """The flags with `true` for each of a bool that has no value."""
    switches = {name for name, hint in get_type_hints(options).items() if hint is bool}
    return [(n, words or ["true"] * (n in switches)) for n, words in flags]


def _name_loose(
    args: Sequence[str], options: type[Any], names: Sequence[str], command: str
) -> Flags:
    """The arguments that belong to no flag as flags, in the order of the fields that lack one.

    Raises:
        ConfigError: there are more of them than fields.
    """
    loose, flags = split_arguments(args)
    for word in loose:
        if re.match(r"[‐-―−]+-*\w", word):
            raise ConfigError(
                f"'{_cut(word)}' begins with a dash of print: write --{word.lstrip('‐‑‒–—―−-')}"
            )
    free = [name for name in names if name not in dict(flags)]
    if len(loose) > len(free):
        word = loose[len(free)]
        flag = args[args.index(word) - 1].lstrip("-").replace("-", "_")
        if flag in SWITCHES and flag in get_type_hints(options):
            raise ConfigError(_refuse_value(flag, word, options))
        raise ConfigError(
            f"'{_cut(word)}' is one argument too many: rwkv-peft {command} takes "
            + (
                f"{' '.join(names)}, and all else as --name value, with quotes around a text of "
                "several words"
                if names
                else "flags alone: --name value"
            )
        )
    return [(name, [word]) for name, word in zip(free, loose, strict=False)]


def _one_line(message: str, options: type[Any]) -> str:
    """jsonargparse's message, which may span lines, in ours: what came, what is allowed."""
    names = [f.name for f in fields(options)]
    if found := re.search(r"unrecognized arguments: (.+)", message, re.DOTALL):
        words = found[1].split()
        flags = [word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)]
        return "; ".join(_answer("flag", flag, names) for flag in (flags or words)[:NAMED])
    if found := re.search(r"Option '(\S+?)' is not accepted", message):
        return _answer("key", found[1], names)
    if found := re.search(r"argument --(\S+): expected one argument", message):
        return _refuse_value(found[1], "nothing", options)
    key = re.search(r'key "(\w+)"', message)
    if key and key[1] in names:
        value = re.search(r"(?:Got|Given) value: ?(.*)", message)
        return _refuse_value(key[1], value[1] if value else "nothing", options)
    if key and key[1] == "config":
        return "--config: " + message.partition(": ")[2].splitlines()[0].strip()
    return _cut(" ".join(message.split()), 1000)


def _refuse_value(name: str, value: str, options: type[Any]) -> str:
    allowed = "a file" if name == "config" else describe_type(get_type_hints(options)[name])
    return f"--{name}: got {_cut(value)}, allowed is {allowed}"


def _answer(what: str, given: str, names: Sequence[str]) -> str:
    """What to say of a flag or key that the command lacks."""
    bare, known = given.lstrip("-").replace("-", "_"), [*names, "config", "debug", "lang"]
    if not (hint := answer_foreign(bare, known)) and not (hint := answer_training(bare, known)):
        near = get_close_matches(bare.lower(), known, 1)
        dashes = "--" if what == "flag" else ""
        hint = f"did you mean {dashes}{near[0]}?" if near else "see --help"
    return f"unknown {what} {_cut(given)}: {hint}"


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length] + " …"
