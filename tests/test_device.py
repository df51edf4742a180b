"""Devices and dtypes, with stand-ins for what this machine lacks."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_peft import device
from rwkv_peft.device import (
    choose_precision,
    fp8_objection,
    has_bf16,
    has_host_memory,
    leave_on_host,
    own_stream,
    resolve_device,
)
from rwkv_peft.errors import BackendUnavailableError, ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets PyTorch seem to find some devices of a type, or none."""

    def pretend(kind: str | None, count: int = 1) -> None:
        accelerator = torch.accelerator
        found = None if kind is None else SimpleNamespace(type=kind)
        monkeypatch.setattr(accelerator, "is_available", lambda: found is not None)
        monkeypatch.setattr(accelerator, "current_accelerator", lambda: found)
        monkeypatch.setattr(accelerator, "device_count", lambda: count)

    pretend(None)
    return pretend


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]
) -> Callable[[str, str], None]:
    """Puts a package where Python finds it."""

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        # set first, so that what is imported is forgotten again: other packages would find it
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.delitem(sys.modules, name)

    return write


BRINGS = (
    "import types, torch\n"
    "torch.accelerator.is_available = lambda: True\n"
    "torch.accelerator.current_accelerator = lambda: types.SimpleNamespace(type='{}')\n"
)


@pytest.mark.parametrize("name", ["auto", "gpu", "xpu"])
def test_the_device_found_is_taken(name: str, machine: Callable[..., None]) -> None:
    machine("xpu")
    assert resolve_device(name).type == "xpu"


def test_without_an_accelerator_auto_is_the_cpu(machine: Callable[..., None]) -> None:
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_one_of_several_devices_is_counted_from_zero(machine: Callable[..., None]) -> None:
    machine("cuda", count=2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BackendUnavailableError, match="this machine has 2 of them"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("found", "name", "message"),
    [
        (None, "gpu", r"no such device.*finds none\): use --accelerator cpu"),
        (None, "mps", r"no such device.*finds none\): use --accelerator cpu"),
        ("mps", "cuda", r"no such device.*finds mps\): use --accelerator mps"),
        (None, "musa", "needs the package torch_musa, which is not installed"),
        ("cuda", "npu", "needs the package torch_npu, which is not installed"),
    ],
)
def test_a_device_that_is_not_here_is_told_with_what_is(
    found: str | None, name: str, message: str, machine: Callable[..., None]
) -> None:
    machine(found)
    with pytest.raises(BackendUnavailableError, match=message):
        resolve_device(name)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "gpu:0", "meta", "", "auto:1"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is not a device: use auto, gpu, cpu, cuda, mps, xpu, musa"
    ):
        resolve_device(name)


@pytest.mark.parametrize(("kind", "package"), [("musa", "torch_musa"), ("npu", "torch_npu")])
@pytest.mark.parametrize("asked", ["auto", "gpu", "kind"])
def test_a_package_that_brings_a_device_is_imported_where_installed(
    kind: str, package: str, asked: str, install: Callable[[str, str], None]
) -> None:
    install(package, BRINGS.format(kind))
    assert resolve_device(kind if asked == "kind" else asked).type == kind


def test_a_package_that_cannot_be_loaded_is_named_with_its_reason(
    install: Callable[[str, str], None], machine: Callable[..., None]
) -> None:
    install("torch_npu", "raise ImportError('libascendcl.so: cannot open\\nsecond line')")
    for name in ("auto", "npu"):
        with pytest.raises(
            BackendUnavailableError,
            match=r"torch_npu is installed but cannot be loaded \(libascendcl.so.*\): mend",
        ):
            resolve_device(name)
    machine("cuda")
    assert resolve_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (lambda including_emulation=True: including_emulation, "fp16"),
        (lambda including_emulation=True: True, "bf16"),
        (lambda: False, "fp16"),
        (lambda: True, "bf16"),
        (None, "bf16"),
    ],
)
def test_precision_is_fp16_where_bf16_is_missing_or_emulated(
    query: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace() if query is None else SimpleNamespace(is_bf16_supported=query)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device("cuda")
    assert has_bf16(device) == (expected == "bf16")
    assert choose_precision(device)[0] == expected


def test_a_build_without_cuda_on_a_machine_with_a_card_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = tmp_path / "nvidia0"
    monkeypatch.setattr(device, "NVIDIA_FILES", (str(card),))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.find_card_problem() == ""
    card.touch()
    with pytest.warns(UserWarning, match="is a build without CUDA, so that the card is not used"):
        assert device.resolve_device("auto").type == "cpu"
    with pytest.raises(BackendUnavailableError, match="a build without CUDA"):
        device.resolve_device("cuda")
    assert device.resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver is too old or not loaded" in device.find_card_problem()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.find_card_problem() == ""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_reads_what_is_left_on_the_host_in_graphs_too(dtype: torch.dtype) -> None:
    gpu = torch.accelerator.current_accelerator()
    assert gpu is not None
    if not has_host_memory(gpu):
        pytest.skip(f"{gpu.type} does not read the host's memory by itself")
    table = torch.randn(1000, 96).to(dtype)
    before = torch.cuda.memory_allocated()
    left = leave_on_host(table.to(gpu), gpu)
    gc.collect()
    assert torch.cuda.memory_allocated() == before and left.device.type == gpu.type
    rows = torch.tensor([[3, 999, 3], [0, 17, 500]])
    given = torch.zeros_like(rows, device=gpu)
    with own_stream(gpu):
        torch.nn.functional.embedding(given, left)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            found = torch.nn.functional.embedding(given, left)
        given.copy_(rows)
        graph.replay()
    assert torch.equal(found.cpu(), table[rows])


def test_a_cpu_says_that_it_has_no_products_of_fp8() -> None:
    assert fp8_objection(torch.device("cpu")) == "cpu has not"
    assert not has_host_memory(torch.device("cpu"))


@pytest.mark.parametrize(
    ("hip", "properties", "why"),
    [
        (None, {"major": 9, "minor": 0}, ""),
        (None, {"major": 8, "minor": 9}, ""),
        (None, {"major": 8, "minor": 6}, "compute capability 8.6 has not"),
        ("6.4", {"gcnArchName": "gfx950:sramecc+:xnack-"}, ""),
        ("6.4", {"gcnArchName": "gfx942:sramecc+:xnack-"}, "gfx942 has not"),
    ],
)
def test_cards_that_multiply_fp8_are_known_by_their_properties(
    hip: str | None, properties: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(**properties))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = fp8_objection(torch.device("cuda", 0))
    assert found.startswith(why) and bool(found) == bool(why)
