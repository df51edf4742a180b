"""`rwkv-peft doctor`"""

import math
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rwkv_peft import __version__
from rwkv_peft.cli.parse import parse
from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.language import translate
from rwkv_peft.printing import print_json, print_text

PACKAGES = ("torch", "peft", "triton", "fla-core")
PRECISIONS = ("bf16", "fp16", "fp32")
HEAD_SIZE = 64
# backends whose kernels are tuned when they first run, for minutes
SLOW = ("fla",)


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What to look at."""

    accelerator: str = "auto"
    """Device: auto, gpu, cpu, cuda, mps, xpu, musa, npu, or one of several as in cuda:1."""
    check_fla: bool = False
    """Check fla too where it is not what auto takes; tuning its kernels takes minutes."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Prints devices, versions and backends, each checked; 2 if one that `auto` takes fails."""
    options = parse(DoctorOptions, args, command="doctor")
    facts = examine(options.accelerator, checks_slow=options.check_fla)
    if options.json:
        print_json(facts)
    else:
        for line in describe(facts):
            print_text(line)
    return 0 if facts["is_well"] else 2


def examine(accelerator: str = "auto", *, checks_slow: bool = False) -> dict[str, Any]:
    """The facts of this machine, ready for JSON: versions, devices, and each backend's check.

    Args:
        checks_slow: check the backends too that take minutes to start and that `auto` passes over.
    Raises:
        BackendUnavailableError: there is no such device.
    """
    from rwkv_peft.device import choose_precision, find_card_problem, resolve_device
    from rwkv_peft.ops import OPERATORS

    with warnings.catch_warnings():
        # what it would say of a card stands in the facts
        warnings.simplefilter("ignore")
        device = resolve_device(accelerator)
    precision, reason = choose_precision(device)
    backends = [
        fact
        for operator in OPERATORS
        for name in PRECISIONS
        for fact in _backends(operator, name, device, checks_slow)
    ]
    return {
        "versions": _versions(),
        "accelerator": str(device),
        "devices": _devices(device),
        "problem": find_card_problem(),
        "precision": precision,
        "precision_reason": reason,
        "backends": backends,
        "is_well": all(b["failure"] is None for b in backends if b["is_auto"]),
    }


def describe(facts: dict[str, Any]) -> Iterator[str]:
    """The facts in lines for a person."""
    yield "versions    " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    for device in facts["devices"]:
        yield "device      " + ", ".join(_say(name, value) for name, value in device.items())
    yield f"accelerator {facts['accelerator']}"
    if facts["problem"]:
        yield f"warning     {facts['problem']}"
    yield f"precision   {facts['precision']} ({facts['precision_reason']})"
    above = None
    for backend in facts["backends"]:
        heading = f"{backend['operator']} in {backend['precision']}"
        if heading != above:
            yield f"\n{heading}"
            above = heading
        verdict = translate(_verdict(backend))
        yield f"  {'*' if backend['is_auto'] else ' '} {backend['name']:<10} {verdict}"
    yield ""
    if facts["is_well"]:
        yield "* is what --op auto takes; each of these is right on this device"
    else:
        yield "* is what --op auto takes; one is WRONG on this device: name another with --op"


def _say(name: str, value: Any) -> str:
    if name == "memory":
        return f"{value / 2**30:.0f} GiB"
    if name == "has_bf16":
        return "bf16" if value else "no bf16"
    return str(value) if name in ("device", "name") else f"{name} {value}"


def _verdict(backend: dict[str, Any]) -> str:
    if backend["objection"] is not None:
        return f"- {backend['objection']}"
    if not backend["is_checked"]:
        return (
            "can serve; not checked, as its kernels are tuned for minutes first: --check_fla true"
        )
    if backend["failure"] is not None:
        return f"FAILS: {backend['failure']}"
    off, allowed = backend["error"], backend["allowed"]
    return (
        f"{backend['worst']} is off by {off:.1e}, {allowed:.1e} is allowed; "
        f"{backend['seconds'] * 1000:.1f} ms (first call {backend['first_seconds']:.2f} s)"
    )


def _backends(
    operator: str, precision: str, device: Any, checks_slow: bool
) -> Iterator[dict[str, Any]]:
    from rwkv_peft.device import dtype_of
    from rwkv_peft.ops import OPERATORS
    from rwkv_peft.ops.dispatch import Request

    request = Request(device, dtype_of(precision), HEAD_SIZE)
    table = OPERATORS[operator].table
    objections = {backend.name: backend.objection(request) for backend in table}
    usable = [name for name, objection in objections.items() if objection is None]
    for name, objection in objections.items():
        fact = {
            "operator": operator,
            "precision": precision,
            "name": name,
            "is_auto": name == usable[0],
            "objection": objection,
            "failure": None,
        }
        fact["is_checked"] = objection is None and (
            name not in SLOW or checks_slow or name == usable[0]
        )
        if fact["is_checked"]:
            fact.update(_check(operator, name, request))
        yield fact


def _check(operator: str, name: str, request: Any) -> dict[str, Any]:
    from rwkv_peft.ops import OPERATORS
    from rwkv_peft.ops.dispatch import select
    from rwkv_peft.ops.fla import cap_autotuning
    from rwkv_peft.ops.selfcheck import check

    try:
        if name == "fla":
            cap_autotuning(1)
        choice = select(operator, OPERATORS[operator].table, name, request)
        first, packed = check(choice, request), check(choice, request, packed=True)
        again = check(choice, request)
    except BackendUnavailableError as error:
        return {"failure": str(error)}
    worst = max((first, packed), key=lambda c: c.share)
    off, allowed = worst.errors[worst.worst]
    return {
        "failure": None if worst.has_passed else worst.describe(),
        "worst": worst.worst,
        # JSON knows no infinity
        "error": off if math.isfinite(off) else None,
        "allowed": allowed,
        "first_seconds": first.seconds,
        "seconds": again.seconds,
    }


def _versions() -> dict[str, str]:
    from rwkv_peft.ops.cuda.availability import versions

    found = {"rwkv-peft": __version__, "python": platform.python_version(), "system": sys.platform}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, **versions()}


def _devices(device: Any) -> list[dict[str, Any]]:
    import torch

    from rwkv_peft.device import has_bf16

    if device.type == "cpu":
        return [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    module, found = torch.get_device_module(device), []
    for index in range(torch.accelerator.device_count()):
        fact: dict[str, Any] = {"device": f"{device.type}:{index}"}
        if hasattr(module, "get_device_properties"):
            properties = module.get_device_properties(index)
            fact |= {"name": properties.name, "memory": properties.total_memory}
            if hasattr(properties, "major"):
                fact["capability"] = f"{properties.major}.{properties.minor}"
        found.append({**fact, "has_bf16": has_bf16(device)})
    return found
