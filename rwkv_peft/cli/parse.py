"""From an argument list to a dataclass, with errors of one line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from rwkv_peft.config import require_finite
from rwkv_peft.errors import ConfigError
from rwkv_peft.guard import require_paths
from rwkv_peft.yaml_file import read_yaml

T = TypeVar("T")


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
    `--config file.yaml` gives values that flags overrule; arguments before the first flag fill the
    fields named in `positional`.

    Args:
        defaults: take the place of the fields' own; names that are no fields are left out.
    Raises:
        ConfigError: a flag, key or value is not allowed.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = " ".join([f"rwkv-peft {command}", *(f"[{p.upper()}]" for p in positional), "[flags]"])
    parser = jsonargparse.ArgumentParser(
        prog=f"rwkv-peft {command}", usage=usage, exit_on_error=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below.")
    parser.add_class_arguments(options)
    names = {f.name for f in fields(options)}  # type: ignore[arg-type]
    parser.set_defaults({n: x for n, x in (defaults or {}).items() if n in names})
    _check_files(args)
    named = _name_positionals([_underscored(a) for a in args], positional, command)
    try:
        values = parser.parse_args(_complete_switches(named, options))
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


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _complete_switches(arguments: list[str], options: type[Any]) -> list[str]:
    """The arguments with `=true` behind each flag of a bool that has no value."""
    switches = {f"--{name}" for name, hint in get_type_hints(options).items() if hint is bool}
    following = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in switches and word.startswith("--") else argument
        for argument, word in zip(arguments, following, strict=False)
    ]


def _name_positionals(arguments: list[str], names: Sequence[str], command: str) -> list[str]:
    count = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    if count > len(names):
        raise ConfigError(
            f"'{arguments[len(names)]}' is one argument too many: rwkv-peft {command} takes "
            + (" ".join(names) or "flags alone")
            + " before its flags"
        )
    named = [
        x
        for name, value in zip(names, arguments[:count], strict=False)
        for x in (f"--{name}", value)
    ]
    return named + arguments[count:]


def _one_line(message: str, options: type[Any]) -> str:
    """jsonargparse's message, which may span lines, in ours: what came, what is allowed."""
    names = [f.name for f in fields(options)]
    if found := re.search(
        r"unrecognized arguments: (\S+)|Option '(\S+?)' is not accepted", message
    ):
        given = _cut((found[1] or found[2]).partition("=")[0])
        near = get_close_matches(given.lstrip("-"), [*names, "config"], 1, cutoff=0.5)
        dashes = "--" if found[1] else ""
        what = "flag" if found[1] else "key"
        if found[1] and not given.startswith("-"):
            return f"'{given}' belongs to no flag: write --name value"
        hint = f"did you mean {dashes}{near[0]}?" if near else "see --help"
        return f"unknown {what} {given}: {hint}"
    key = re.search(r'key "(\w+)"', message)
    if key and key[1] in names:
        value = re.search(r"(?:Got|Given) value: ?(.*)", message)
        allowed = _allowed(get_type_hints(options)[key[1]])
        return f"--{key[1]}: got {_cut(value[1] if value else 'nothing')}, allowed is {allowed}"
    if key and key[1] == "config":
        return "--config: " + message.partition(": ")[2].splitlines()[0].strip()
    return _cut(" ".join(message.split()), 1000)


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _allowed(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if args := [a for a in get_args(hint) if a is not type(None)]:
        if get_origin(hint) is dict:
            return "JSON in braces such as '{\"r\": 8}'"
        if get_origin(hint) in (list, tuple):
            return f"a list of {_allowed(args[0])}"
        return " or ".join(map(_allowed, args))
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return plain.get(hint, Path(str(hint)).name)
