"""Options of a method, from JSON to what the fields of its config in peft take."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from rwkv_peft.errors import ConfigError, RwkvPeftError

# numbers that peft declares whole and computes with as they are: lora_alpha, delora_lambda …
_REAL = re.compile(r"alpha|lambda")

# of an initialisation, such as pissa_niter_4
MOST_ITERATIONS = 1000

# of options in other programs
OTHER_NAMES = {"rank": "r", "lora_rank": "r", "lora_r": "r", "dim": "r", "scale": "lora_alpha"}

# what peft and PyTorch raise under options that they do not foresee
_OF_PEFT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Makes one line, which begins with `what`, of any error that peft raises inside.

    What peft meets under impossible options is of every kind, from KeyError to RuntimeError.

    Raises:
        ConfigError: in place of these.
    """
    try:
        yield
    except (RwkvPeftError, torch.OutOfMemoryError):
        raise
    except _OF_PEFT as error:
        said = " ".join(str(error).split())[:400] or "no reason given"
        kind = "" if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: "
        raise ConfigError(f"{what}: {kind}{said}") from error


def build_options(
    config_class: Any, options: Mapping[str, Any], allowed: list[str]
) -> dict[str, Any]:
    """The arguments of a config of peft, its nested configs made of JSON objects.

    Args:
        allowed: names of the options that may be given.
    Raises:
        ConfigError: an option is unknown, or its value is of another type than the config declares.
    """
    return _build(config_class, options, allowed, "")


def _build(
    config_class: Any, options: Mapping[str, Any], allowed: list[str], outer: str
) -> dict[str, Any]:
    hints = get_type_hints(config_class)
    found = {}
    for key, value in options.items():
        if key not in allowed:
            near = _find_near(key, allowed)
            where, names = f"peft_config{' of ' * bool(outer)}{outer}", ", ".join(allowed)
            if near:
                raise ConfigError(
                    f"{where} has no option {_show(key)}: did you mean '{near}'? Allowed: {names}"
                )
            raise ConfigError(f"{where} has no option {_show(key)}. Allowed: {names}")
        name = f"{outer}.{key}".lstrip(".")
        hint = hints.get(key, Any)
        if _REAL.search(key):
            hint = _take_real(hint)
        try:
            found[key] = _convert(value, hint, name)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"peft_config: {name} must be {_describe(hint)}, got {_show(value)}"
            ) from error
        if "dropout" in key and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ConfigError(f"peft_config: {name} must lie in [0, 1), got {value!r}")
    return found


def _find_near(key: str, allowed: list[str]) -> str:
    """The option that was meant, by its name in other programs or by its letters; "" if none."""
    # alpha and dropout are those of the method
    named = [x for x in allowed if x == OTHER_NAMES.get(key) or x.endswith(f"_{key}")]
    return next(iter(named or get_close_matches(key, allowed, 1)), "")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """The value as a type hint wants it; TypeError or ValueError if it is no such value."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        # an object rather becomes a config of peft, which names wrong keys, than stays one
        for kind in sorted(args, key=lambda x: not is_dataclass(x)):
            try:
                return _convert(value, kind, name)
            except ConfigError:
                raise
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        return _pick(value, args)
    if is_dataclass(hint):
        return _convert_config(value, hint, name)
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return _convert_items(value, origin or hint, args, name)
    if origin is dict or hint is dict:
        return _convert_object(value, args, name)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return _convert_scalar(value, hint)


def _convert_config(value: Any, config_class: Any, name: str) -> Any:
    if isinstance(value, config_class):
        return value
    if not isinstance(value, Mapping):
        raise TypeError
    names = [f.name for f in fields(config_class) if f.init]
    return config_class(**_build(config_class, value, names, name))


def _convert_items(value: Any, kind: Any, args: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, (list, tuple, set)):
        raise TypeError
    # tuple[int, int] counts its items, list[int] and tuple[int, ...] do not
    if kind is tuple and args and args[-1] is not ...:
        if len(value) != len(args):
            raise ValueError
        return tuple(_convert(x, hint, name) for x, hint in zip(value, args, strict=True))
    items = [_convert(x, args[0] if args else Any, name) for x in value]
    return tuple(items) if kind is tuple else items


def _convert_object(value: Any, args: tuple[Any, ...], name: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    key, item = args or (Any, Any)
    return {_convert(k, key, name): _convert(x, item, name) for k, x in value.items()}


def _convert_scalar(value: Any, hint: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        if not math.isfinite(value):
            raise ValueError
        return value
    if isinstance(value, bool) and hint is int:
        raise TypeError
    if isinstance(hint, type) and not isinstance(value, hint):
        raise TypeError
    return value


def _pick(value: Any, allowed: tuple[Any, ...]) -> Any:
    # peft writes 'pissa_niter_[number of iters]' for names that end in a number
    written = value
    if isinstance(value, str):
        found = re.search(r"_(\d+)\Z", value, re.ASCII)
        if found and not 0 < int(found[1][:9]) <= MOST_ITERATIONS:
            raise ValueError
        written = re.sub(r"_\d+$", "_[number of iters]", value.lower())
    if not any(type(x) is type(written) and x in (value, written) for x in allowed):
        raise ValueError
    return value


def _take_real(hint: Any) -> Any:
    args = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_take_real(x) for x in args)]  # noqa: UP007 of a computed tuple
    return float if hint is int else hint


_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    NoneType: ("null", "null"),
}


def _show(value: object) -> str:
    """A value as a message shows it, cut if it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, or a number of too many digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 100 else text[:100] + " …"


def _describe(hint: Any, *, many: bool = False) -> str:
    """A type in words, as in 'a string or a list of strings or null'."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_describe(x, many=many) for x in args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if hint in _WORDS:
        return _WORDS[hint][many]
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        items = dict.fromkeys(_describe(x, many=True) for x in args if x is not ...)
        return ("lists" if many else "a list") + (f" of {' and '.join(items)}" if items else "")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(x.value) for x in hint)
    return "objects" if many else "an object"
