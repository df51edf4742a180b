"""Choice of an operator's backend: a literal table, read once when a model is built."""

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
        load: imports and returns the function; called only for the backend that was chosen.
        objection: why it cannot serve a request, as the rest of a sentence; None if it can.
        note: in a few words, what it is; printed with the choice.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    objection: Callable[[Request], str | None]
    note: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen backend, its function and the reason, for the log.

    Attributes:
        operator: name of what it computes.
        others: names of the other backends that can serve, best first.
    """

    operator: str
    name: str
    function: Callable[..., Any]
    reason: str
    others: tuple[str, ...]


def select(operator: str, table: Sequence[Backend], op: str, request: Request) -> Choice:
    """The backend named by `op`, or for 'auto' the first of `table` without an objection.

    Tables name the fastest backend first: cuda, triton, fla, torch, reference.

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


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
