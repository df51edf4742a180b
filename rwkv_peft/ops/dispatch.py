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
    """The chosen backend, its function and the reason, for the log."""

    name: str
    function: Callable[..., Any]
    reason: str


def select(operator: str, table: Sequence[Backend], op: str, request: Request) -> Choice:
    """The backend named by `op`, or for 'auto' the first of `table` without an objection.

    Raises:
        BackendUnavailableError: `op` is unknown, or cannot serve the request.
    """
    objections = {backend.name: backend.objection(request) for backend in table}
    if op == "auto":
        for backend in table:
            if objections[backend.name] is None:
                passed = [f"{n} {o}" for n, o in objections.items() if o is not None]
                reason = "; ".join([backend.note, *passed])
                return Choice(backend.name, backend.load(), reason)
        raise BackendUnavailableError(
            f"{operator}: no backend can serve: "
            + "; ".join(f"{name} {why}" for name, why in objections.items())
        )
    for backend in table:
        if backend.name == op:
            if (why := objections[op]) is not None:
                usable = [name for name, objection in objections.items() if objection is None]
                raise BackendUnavailableError(
                    f"op='{op}' {why}: use --op {' or --op '.join(['auto', *usable])}"
                )
            return Choice(op, backend.load(), f"{backend.note}; asked for by name")
    names = ", ".join(["auto", *objections])
    raise BackendUnavailableError(f"op='{op}' is not a backend of {operator}: use one of {names}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
