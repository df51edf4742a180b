"""What the options of a method may cost: memory of its tensors, time of its patterns.

A saved adapter comes from anywhere, and its config may ask for a rank of 10^12 or hold a regular
expression that never ends. Both are refused before they are carried out.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_peft.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

# elements that any adapter may have in all, 256 MiB in float32; more only if the model is large
LEAST_ELEMENTS = 1 << 26
# tensors that a method may make for each module of the model
TENSORS_A_MODULE = 200
# seconds for all patterns of a config on all names of a model, where some milliseconds are usual
SECONDS = 4.0
NUM_PATTERNS = 10_000
# patterns that cannot go back and try again: names, with dots that may be escaped
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")
# the forms in which peft looks for a pattern in a name; what does not compile is told by peft
_MATCHING = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
forms = [r"(?:{})\Z", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."]
for pattern in patterns:
    for form in forms:
        try:
            found = re.compile(form.replace("{}", pattern))
        except (re.error, RecursionError, OverflowError, ValueError):
            continue
        for name in names:
            found.match(name)
    for name in names:
        try:
            re.search(pattern, name)
        except (re.error, RecursionError, OverflowError, ValueError):
            break
"""


class BoundedMemory(TorchDispatchMode):
    """Within it, new tensors that no adapter of a model needs are refused before they are made.

    All of them together may have eight times the elements of the model, since methods exist that
    decompose each weight, and a single one twice those of the largest weight.

    Raises:
        ConfigError: a tensor would be beyond that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        sizes = [x.numel() for x in model.parameters()]
        self._allowed = max(LEAST_ELEMENTS, 8 * sum(sizes))
        self._largest = max(LEAST_ELEMENTS // 4, 2 * max(sizes, default=0))
        self._count = TENSORS_A_MODULE * (len(sizes) + 10)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts what an operation of PyTorch will make, and carries it out."""
        given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        is_new = not any(a.alias_info for a in func._schema.arguments)
        if is_new and (shape := _find_shape(given)):
            size = math.prod(shape)
            self._allowed -= size
            self._count -= 1
            if size > self._largest or self._allowed < 0 or self._count < 0:
                raise ConfigError(
                    f"its options ask for a tensor of {' x '.join(map(str, shape))}, more than an "
                    "adapter of this model can use: give a smaller rank or number"
                )
        return func(*args, **(kwargs or {}))


def _find_shape(given: Mapping[str, Any]) -> list[int]:
    """The shape that an operation is told to make; empty if its inputs decide that."""
    for name in ("size", "repeats"):
        if isinstance(shape := given.get(name), (list, tuple)):
            return [int(x) for x in shape]
    numbers = [given.get("n"), given.get("m", 1)]
    if numbers[0] is None and "steps" in given:
        numbers = [given["steps"]]
    if numbers[0] is None and isinstance(end := given.get("end"), int):
        # arange, whose length is taken for as large as its end
        numbers = [end] if "self" not in given else [None]
    return [int(x) for x in numbers] if all(isinstance(x, int) for x in numbers) else []


def check_patterns(model: nn.Module, config: "PeftConfig") -> None:
    """Raises ConfigError unless all patterns of a config can be matched with a model in time.

    A regular expression may take longer than the world lasts for a name of forty letters, and
    nothing ends a match within a process; so they are tried in a process of their own. Names and
    lists of names need none.
    """
    patterns = list(dict.fromkeys(_iterate_patterns(config)))
    if len(patterns) > NUM_PATTERNS:
        raise ConfigError(
            f"its options name {len(patterns):,} modules and patterns, allowed are {NUM_PATTERNS:,}"
        )
    patterns = [x for x in patterns if not _PLAIN.fullmatch(x)]
    if not patterns:
        return
    names = [name for name, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCHING],
            input=json.dumps([patterns, names]).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.SubprocessError as error:
        shown = max(patterns, key=len)
        raise ConfigError(
            f"its patterns of module names, such as {shown[:80]!r}, take more than {SECONDS:.0f} "
            "s, or too much memory, on the names of this model: name the modules, or use a "
            "pattern without nested * and +"
        ) from error


def _iterate_patterns(config: "PeftConfig") -> Iterator[str]:
    for field, value in vars(config).items():
        if "modules" not in field and "pattern" not in field and field != "target_svd_config":
            continue
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple, set, dict)):
            yield from (x for x in value if isinstance(x, str))
