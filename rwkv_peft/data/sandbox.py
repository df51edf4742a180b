"""The environment of Jinja templates: nothing of Python is in reach, and all they do is limited."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# turns of loops, calls and filters of one rendering; what they work on counts by its length
MOST_STEPS = 200_000
# characters of any value, beside four times those of the messages
MOST_CHARACTERS = 1_000_000
# a width or precision in a format that is no mistake has fewer digits
_WIDE = re.compile(r"%[-+ #0.\d]*(?:\d{5}|\*)|\{[^{}]*[:.][^{}]*\d{5}")
# what makes a text longer by a number that it is given, or by another text for each of its own
_WIDENING = ("indent", "expandtabs", "wordwrap", "replace", "batch", "slice")
_FORMATTING = ("format", "format_map", "strftime")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which loops, calls, numbers and texts have a largest size.

    The sandbox alone keeps templates from files and Python, and lets them loop for ever or make
    a text that fills the memory. Call `begin` before each rendering.

    Raises:
        jinja2.TemplateRuntimeError: a template has gone beyond a limit.
    """

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begin(0)
        # that makes texts of any length, of which templates of dialogues have no need
        del self.globals["lipsum"]
        self.filters = {name: self._guard(name, f) for name, f in self.filters.items()}
        self.filters |= {"_counted": self._count, "_sized": self._require_size}
        self.concat = self._join  # type: ignore[method-assign]

    def begin(self, num_characters: int) -> None:
        """Gives the next rendering its limits; `num_characters` are those of its messages."""
        self._steps, self._largest = MOST_STEPS, MOST_CHARACTERS + 4 * num_characters

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls what the sandbox allows, if nothing that is given or comes back is too large."""
        name = getattr(__obj, "__name__", "")
        # the sandbox has a wrapper of its own around the methods that format
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        given = [owner] if isinstance(owner, (str, bytes, int)) else []
        __self._require_small(str(name), [*given, *args, *kwargs.values()])
        return __self._require_size(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes a product, a power, a sum or a text from a format, if it is not too large."""
        size = 0
        if operator == "%" and isinstance(left, str):
            self._require_small("format", [left])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = max(abs(left).bit_length(), 1) * abs(right) * 100
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            size = 100 * (left.bit_length() + right.bit_length())
        elif operator == "*":
            size = _measure(left) * _measure(right)
        if size > self._largest:
            raise TemplateRuntimeError("it makes a number or a text that is too large")
        return self._require_size(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template, in which each turn of a loop is counted and each value that is kept."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(loop.iter, "_counted")
        for kept in tree.find_all(nodes.Assign):
            kept.node = _filter(kept.node, "_sized")
        return tree

    def _guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if name == "join":
                args = tuple(list(x) if isinstance(x, Iterator) else x for x in args)
            self._require_small(name, [*args, *kwargs.values()])
            return self._require_size(function(*args, **kwargs))

        return guarded

    def _spend(self, *values: Any) -> None:
        """Takes a step, and more for what is long."""
        self._steps -= 1 + sum(
            len(x) // (1000 if isinstance(x, (str, bytes)) else 10) for x in values if _is_long(x)
        )
        if self._steps < 0:
            raise TemplateRuntimeError(f"it takes more than {MOST_STEPS:,} steps: does it end?")

    def _count(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend()
            yield value

    def _require_small(self, name: str, given: Sequence[Any]) -> None:
        """Raises unless a call with these arguments can make only what is small."""
        self._spend(*given)
        sizes = sorted(
            (_measure(x) for x in given if isinstance(x, (str, bytes, int))), reverse=True
        )
        limit = self._largest
        if name in _WIDENING and len(sizes) > 1 and sizes[0] * sizes[1] > 100 * limit:
            raise TemplateRuntimeError(f"{name} makes a text that is too long")
        if any(size > limit for size in sizes):
            raise TemplateRuntimeError(f"{name or 'a call'} is given what is too large")
        if name == "join":
            # the glue stands between the parts, in whatever order a filter or a method has them
            count = max((len(x) for x in given if _is_long(x)), default=0)
            parts = sum(_measure(part) for x in given if isinstance(x, (list, tuple)) for part in x)
            if parts + count * (min(sizes) if sizes else 0) > limit:
                raise TemplateRuntimeError("join makes a text that is too long")
        if name in _FORMATTING and any(_WIDE.search(x) for x in given if isinstance(x, str)):
            raise TemplateRuntimeError(f"{name} is given a width of more than 9999")

    def _require_size(self, value: Any) -> Any:
        self._spend(value)
        if _is_long(value) and len(value) > self._largest:
            raise TemplateRuntimeError("it makes a text that is too long")
        return value

    def _join(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        if sum(map(len, parts)) > self._largest:
            raise TemplateRuntimeError("it makes a text that is too long")
        return "".join(parts)


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _is_long(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple, dict, range))


def _measure(value: Any) -> int:
    """The length of a text or list, the absolute value of a whole number, 0 for all else."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if _is_long(value) else 0
