"""The Triton kernels on a machine without a GPU: interpreted, and compiled for several."""

import importlib.util
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.triton import Launcher, Variant
from tests.processes import run_interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
# shared memory of one block, in bytes, by the arguments of Triton's GPUTarget
NVIDIA = {("cuda", 80, 32): 163 * 1024, ("cuda", 89, 32): 99 * 1024, ("cuda", 90, 32): 227 * 1024}
AMD = {("hip", "gfx942", 64): 64 * 1024}


def test_kernels_give_right_results_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


def variants(op: str) -> Iterator[Variant]:
    """All that the kernels of an operator are compiled to."""
    found: Iterator[Variant] = import_module(f"rwkv_peft.ops.{op}.triton").variants()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("op", "target", "shared"),
    # those of WKV-7 have not been made to fit into what AMD has
    [
        # the first is the most usual; each takes half a minute
        pytest.param(op, *found, marks=[pytest.mark.slow] if number else [])
        for op in OPERATORS
        for number, found in enumerate((NVIDIA if op == "wkv7" else NVIDIA | AMD).items())
    ],
)
def test_kernels_compile_and_fit_into_shared_memory(
    op: str, target: tuple[str, Any, int], shared: int
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend

    offered = make_backend(GPUTarget(*target)).parse_options({}).allowed_dot_input_precisions
    needed = import_module(f"rwkv_peft.ops.{op}").SHARED_MEMORY
    for launcher, arguments in variants(op):
        if "tf32x3" not in offered:
            arguments = tuple("ieee" if x == "tf32x3" else x for x in arguments)
        names, constants = launcher.kernel.arg_names, {}
        signature = dict(zip(names, arguments, strict=True))
        for name, value in signature.items():
            if not (isinstance(value, str) and (value[0] == "*" or value == "i32")):
                constants[name], signature[name] = value, "constexpr"
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
        }
        source = ASTSource(launcher.kernel, signature, constants, aligned)
        compiled = compile(source, GPUTarget(*target), launcher.options)
        assert compiled.metadata.shared <= min(shared, needed), launcher.kernel.__name__


@pytest.mark.parametrize("op", OPERATORS)
def test_a_compiled_kernel_serves_every_length_and_number_of_heads(op: str) -> None:
    for launcher, arguments in variants(op):
        for parameter, value in zip(launcher.kernel.params, arguments, strict=True):
            is_number = isinstance(value, str) and value == "i32"
            assert parameter.do_not_specialize == is_number, parameter.name


def test_what_was_compiled_for_one_type_is_not_used_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compilations = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
            return self.compile

        def compile(self, *arguments: Any, **options: int) -> dict[Any, Callable[..., None]]:
            compilations.append([x.dtype for x in arguments])
            return {(1, 1, 1): lambda *arguments: None}

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: None)
    launcher = Launcher(Kernel(), num_warps=4)
    launcher.is_compiled = True
    for out in (torch.float16, torch.float32, torch.float16):
        launcher((1, 1, 1), (torch.zeros(4), torch.zeros(4, dtype=out)), (), ())
    assert compilations == [[torch.float32, torch.float16], [torch.float32, torch.float32]]


def triton_objection(op: str, device: torch.device, dtype: torch.dtype, size: int = 64) -> str:
    (backend,) = [b for b in OPERATORS[op].table if b.name == "triton"]
    return str(backend.objection(Request(device, dtype, size)))


@pytest.mark.parametrize("op", OPERATORS)
def test_what_triton_cannot_serve_is_said(op: str) -> None:
    gpu = torch.device("cuda")
    assert triton_objection(op, torch.device("cpu"), torch.bfloat16) == "needs a GPU"
    assert triton_objection(op, gpu, torch.bfloat16, 32) == "needs head size 64, got 32"
    assert "not in float64" in triton_objection(op, gpu, torch.float64)
    said = triton_objection(op, torch.device("mps"), torch.float16)
    assert said.startswith("has no driver for mps: ")


@pytest.mark.parametrize(
    ("op", "arch", "shared", "why"),
    [
        ("wkv7", 90, 232448, None),
        ("wkv7", 89, 101376, None),
        ("wkv7", "gfx942", 65536, "needs 101376 bytes of shared memory, and this GPU has 65536"),
        ("wkv6", "gfx942", 65536, None),
        ("wkv6", 75, 65536, "needs compute capability 8.0, and this GPU has 7.5"),
    ],
)
def test_a_device_that_cannot_run_the_kernels_is_told_why(
    op: str, arch: object, shared: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_peft.ops.triton._of_device", lambda device: (arch, shared))
    assert triton_objection(op, torch.device("cuda", 0), torch.float16) == str(why)
