"""Reading YAML that anybody may have written."""

from pathlib import Path
from typing import Any

from rwkv_peft.errors import ConfigError

# bytes of a file, values in it with all that is repeated by name, and levels of nesting
LARGEST_FILE, MOST_VALUES, MOST_LEVELS = 1 << 17, 100_000, 50


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file.

    Names (`&name`, `*name`) may be used, but not so that a few lines stand for billions of values,
    nor for themselves.

    Raises:
        ConfigError: it cannot be read, is not YAML, or is too large or nested too deeply.
    """
    import yaml

    try:
        size = Path(path).stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes, allowed are {LARGEST_FILE:,}")
        text = Path(path).read_text(encoding="utf-8-sig")
        if (root := yaml.compose(text, yaml.SafeLoader)) is not None:
            _measure(root, {}, ())
        return yaml.safe_load(text)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        is_deep = isinstance(error, RecursionError)
        said = "it is nested too deeply" if is_deep else " ".join(str(error).split())[:300]
        if isinstance(error, UnicodeDecodeError):
            said = "it is not in UTF-8: save it as UTF-8"
        if isinstance(error, yaml.YAMLError) and "escape" in said:
            said += (
                ": between double quotes a backslash is no part of a path: use single ones, or /"
            )
        raise ConfigError(f"{path} cannot be read as YAML: {said}") from error


def _measure(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """The number of values that a node of YAML stands for.

    Raises:
        ValueError: they are too many or too deep, or one holds itself.
    """
    if id(node) in above:
        raise ValueError("a value holds itself")
    if len(above) > MOST_LEVELS:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else []
        within = [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_measure(x, known, (*above, id(node))) for x in within)
    if known[id(node)] > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    return known[id(node)]
