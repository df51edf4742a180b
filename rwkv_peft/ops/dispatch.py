"""Choice of an operator's backend: a literal table, read once when a model is built."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rwkv_peft.errors import BackendUnavailableError


@dataclass(frozen=True, slots=True)
class Request:
    """What a backend must serve."""

    device: torch.device
    dtype: torch.dtype
    head_size: int


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: the value of `--op` that asks for it.
        source: its function as "module:name", or what gives the function; used by `load` alone.
        objects: what `objection` asks, likewise a name if its module is to be imported late; None
            if it can serve every request.
        note: in a few words, what it is; printed with the choice.
    """

    name: str
    source: str | Callable[[], Callable[..., Any]]
    objects: str | Callable[[Request], str | None] | None
    note: str

    def load(self) -> Callable[..., Any]:
        """Its function; called only for the backend that was chosen."""
        return _imported(self.source) if isinstance(self.source, str) else self.source()

    def objection(self, request: Request) -> str | None:
        """Why it cannot serve a request, as the rest of a sentence; None if it can."""
        objects = _imported(self.objects) if isinstance(self.objects, str) else self.objects
        why: str | None = objects(request) if objects else None
        return why


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen backend, its function and the reason, for the log.

    Attributes:
        operator: the name of what it computes.
        others: the names of the other backends that can serve, the best first.
    """

    operator: str
    name: str
    function: Callable[..., Any]
    reason: str
    others: tuple[str, ...]


def select(operator: str, table: Sequence[Backend], op: str, request: Request) -> Choice:
    """The backend named by `op`, or for 'auto' the first of `table` without an objection.

    A table names the fastest backend first.

    Raises:
        BackendUnavailableError: `op` is unknown, or cannot serve the request.
    """
    objections = {backend.name: backend.objection(request) for backend in table}
    passed = [f"{name} {why}" for name, why in objections.items() if why is not None]
    usable = [name for name, why in objections.items() if why is None]
    if op == "auto" and not usable:
        raise BackendUnavailableError(f"{operator}: no backend can serve: {'; '.join(passed)}")
    name = usable[0] if op == "auto" else op
    if name not in objections:
        names = ", ".join(["auto", *objections])
        raise BackendUnavailableError(f"op='{op}' is not a backend of {operator}: use {names}")
    if name not in usable:
        raise BackendUnavailableError(
            f"op='{op}' {objections[op]}: use --op {' or --op '.join(['auto', *usable])}"
        )
    backend = next(b for b in table if b.name == name)
    reasons = [backend.note, *(passed if op == "auto" else ["asked for by name"])]
    others = tuple(other for other in usable if other != name)
    return Choice(operator, name, backend.load(), "; ".join(reasons), others)


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # it is imported already, from no file
        return True
