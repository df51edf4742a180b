"""From an argument list to a dataclass, with errors of one line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rwkv_peft.cli.foreign import answer_foreign
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
    `--config file.yaml` gives values that flags overrule; arguments before the first flag fill the
    fields named in `positional`.

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
    if found := re.search(r"unrecognized arguments: (.+)", message, re.DOTALL):
        words = found[1].split()
        if not words[0].startswith("-"):
            return f"'{_cut(words[0])}' belongs to no flag: write --name value"
        flags = [word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)]
        return "; ".join(_answer("flag", flag, names) for flag in (flags or words)[:NAMED])
    if found := re.search(r"Option '(\S+?)' is not accepted", message):
        return _answer("key", found[1], names)
    key = re.search(r'key "(\w+)"', message)
    if key and key[1] in names:
        value = re.search(r"(?:Got|Given) value: ?(.*)", message)
        allowed = describe_type(get_type_hints(options)[key[1]])
        return f"--{key[1]}: got {_cut(value[1] if value else 'nothing')}, allowed is {allowed}"
    if key and key[1] == "config":
        return "--config: " + message.partition(": ")[2].splitlines()[0].strip()
    return _cut(" ".join(message.split()), 1000)


def _answer(what: str, given: str, names: Sequence[str]) -> str:
    """What to say of a flag or key that the command lacks."""
    bare, known = given.lstrip("-"), [*names, "config", "debug"]
    if not (hint := answer_foreign(bare, known)):
        near = get_close_matches(bare, known, 1, cutoff=0.5)
        dashes = "--" if what == "flag" else ""
        hint = f"did you mean {dashes}{near[0]}?" if near else "see --help"
    return f"unknown {what} {_cut(given)}: {hint}"


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length] + " …"
