"""Kernels of ops/ on a CPU: compiled by g++ against emulation.h, called as `driver.Kernel` is."""

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

HEADER = Path(__file__).with_name("emulation.h")
ARENA = (1 << 20) - 256  # bytes of emulation.h's shared memory
POISON = b"\xff"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulated-")


def _command(source: Path, options: Sequence[str]) -> list[str]:
    headers = Path(__file__).parents[3] / "rwkv_peft" / "ops" / "cuda"
    command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-strict-aliasing"]
    return [*command, *options, "-include", str(HEADER), f"-I{headers}", "-x", "c++", str(source)]


def require(condition: str, source: Path, options: Sequence[str]) -> None:
    """Fails unless a condition of constants holds in a source."""
    with tempfile.NamedTemporaryFile("w", suffix=".cu") as file:
        file.write(f'#include "{source}"\nstatic_assert({condition}, "");\n')
        file.flush()
        command = [*_command(Path(file.name), options), "-fsyntax-only"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def _compiled(source: Path, options: Sequence[str]) -> ctypes.CDLL:
    library = (
        Path(_folder().name) / f"{source.parent.parent.name}_{source.stem}{''.join(options)}.so"
    )
    subprocess.run([*_command(source, options), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def load(
    source: Path, name: str, signature: str, shared_bytes: int, options: Sequence[str]
) -> Callable[..., Callable[..., None]]:
    """A kernel whose launches run at once, on addresses of CPU tensors.

    Its shared memory begins as NaN. One that writes beyond `shared_bytes` of it fails the test.
    """
    library = _compiled(source, tuple(options))
    kernel = getattr(library, name)

    def prepare(grid: tuple[int, int, int], block: int, *numbers: int) -> Callable[..., None]:
        def launch(*addresses: int) -> None:
            packed = struct.pack("@" + signature, *addresses, *numbers)
            kernel(ctypes.c_char_p(packed), *grid[:2], block)
            shared = ctypes.c_void_p.in_dll(library, "shared_memory").value
            assert shared is not None
            beyond = ctypes.string_at(shared + shared_bytes, ARENA - shared_bytes)
            assert beyond.count(POISON) == len(beyond), f"{name} writes beyond its shared memory"

        return launch

    return prepare
