"""`rwkv-peft doctor`."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_peft.cli import doctor
from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.dispatch import Backend

Cli = Callable[..., SimpleNamespace]


def test_every_backend_is_checked_in_every_type_or_says_why_not(cli: Cli) -> None:
    done = cli("doctor", "--accelerator", "cpu", "--json")
    facts = json.loads(done.out)
    assert done.code == 0 and facts["is_well"]
    assert facts["versions"]["torch"] == torch.__version__
    assert [d["device"] for d in facts["devices"]] == ["cpu"]
    expected = [
        (operator, precision, backend.name)
        for operator in OPERATORS
        for precision in ("bf16", "fp16", "fp32")
        for backend in OPERATORS[operator].table
    ]
    found = facts["backends"]
    assert [(b["operator"], b["precision"], b["name"]) for b in found] == expected
    assert sum(b["is_auto"] for b in found) == 6
    for backend in found:
        assert backend["is_checked"] == (backend["objection"] is None)
        if backend["is_checked"]:
            assert 0 < backend["error"] <= backend["allowed"] and backend["failure"] is None
            assert 0 < backend["seconds"] < 60
        else:
            assert not backend["is_auto"]
    assert {b["name"] for b in found if b["objection"] is None} == {"torch", "reference"}


def _broken(*given: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def _wrong(*given: Any) -> Any:
    y, state = OPERATORS["wkv7"].chunked(*given)
    return y * float("nan"), state


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (_wrong, "FAILS: y holds values that are not finite"),
        (
            _broken,
            "FAILS: op='stub' does not run on cpu: no kernel image is available; use --op torch",
        ),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_backend_that_fails_is_shown_and_ends_with_2_if_auto_takes_it(
    kernel: Any, message: str, is_first: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PRECISIONS", ("fp32",))
    row = Backend("stub", lambda: kernel, lambda request: None, "of this test")
    torch_row = next(b for b in OPERATORS["wkv7"].table if b.name == "torch")
    table = (row, torch_row) if is_first else (torch_row, row)
    monkeypatch.setitem(OPERATORS, "wkv7", OPERATORS["wkv7"]._replace(table=table))
    done = cli("doctor", "--accelerator", "cpu")
    assert done.code == (2 if is_first else 0)
    (line,) = [line for line in done.out.splitlines() if " stub " in line]
    assert line.endswith(message) and line.startswith("  *" if is_first else "   ")
    assert ("one is WRONG" in done.out.splitlines()[-1]) == is_first


@pytest.mark.parametrize("is_asked", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_backend_that_is_tuned_for_minutes_is_checked_if_asked_for_or_taken(
    is_asked: bool, is_first: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(doctor, "SLOW", ("stub",))
    operator = OPERATORS["wkv7"]
    row = Backend("stub", lambda: operator.chunked, lambda request: None, "of this test")
    torch_row = next(b for b in operator.table if b.name == "torch")
    table = (row, torch_row) if is_first else (torch_row, row)
    monkeypatch.setitem(OPERATORS, "wkv7", operator._replace(table=table))
    done = cli("doctor", "--accelerator", "cpu", "--check_fla", is_asked)
    assert done.code == 0
    (line,) = [line for line in done.out.splitlines() if " stub " in line]
    assert ("is off by" in line) == (is_asked or is_first)
    assert line.endswith("--check_fla true") == (not is_asked and not is_first)


def test_devices_are_told_in_words() -> None:
    facts = {
        "versions": {"torch": "2.13.0"},
        "devices": [
            {
                "device": "cuda:0",
                "name": "NVIDIA H200",
                "memory": 150 * 2**30,
                "capability": "9.0",
                "has_bf16": True,
            }
        ],
        "accelerator": "cuda",
        "problem": "",
        "precision": "bf16",
        "precision_reason": "half the memory",
        "backends": [],
        "is_well": True,
    }
    lines = list(doctor.describe(facts))
    assert lines[1] == "device      cuda:0, NVIDIA H200, 150 GiB, capability 9.0, bf16"


def test_properties_of_every_device_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="GPU", total_memory=2**34, major=7, minor=5)
    module = SimpleNamespace(
        get_device_properties=lambda index: properties,
        is_bf16_supported=lambda including_emulation=True: including_emulation,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    first, second = doctor._devices(torch.device("cuda"))
    assert (first["device"], second["device"]) == ("cuda:0", "cuda:1")
    assert (first["memory"], first["capability"], first["has_bf16"]) == (2**34, "7.5", False)
