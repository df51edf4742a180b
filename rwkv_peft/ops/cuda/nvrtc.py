"""CUDA sources to machine code through NVRTC, which every CUDA build of PyTorch brings along."""

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rwkv_peft.errors import BackendUnavailableError

IS_WINDOWS = sys.platform == "win32"
# Windows has libraries of nvrtc64_120_0.dll and its like; an .alt build is of older tools
PATTERN = "nvrtc64_*_0.dll" if IS_WINDOWS else "libnvrtc.so*"
BUILTINS = "nvrtc-builtins64_*.dll" if IS_WINDOWS else "libnvrtc-builtins.so*"
LOG_LINES = 12
# nothing in a source is for the host, so that constexpr functions need no mark
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")


def compile(
    source: str,
    *,
    arch: str,
    name: str = "kernel.cu",
    options: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> tuple[bytes, str]:
    """A cubin of `source` for a GPU, or PTX where the GPU is newer than NVRTC, and NVRTC's log.

    Args:
        source: CUDA C++ with `extern "C"` kernels; no header of the host exists for it, and a
            function without a mark is one of the device.
        arch: the GPU, such as 'sm_90'.
        name: stands in messages.
        options: of NVRTC, such as '-DC=64'.
        headers: what `#include "name"` finds, by name.
    Raises:
        BackendUnavailableError: there is no NVRTC, it knows no GPU as old, or the source is wrong;
            the message holds the first lines of the log.
    """
    library = load()
    headers = headers or {}
    target, is_ptx = _target(arch, supported_archs())
    names = (ctypes.c_char_p * len(headers))(*(n.encode() for n in headers))
    texts = (ctypes.c_char_p * len(headers))(*(t.encode() for t in headers.values()))
    arguments = [f"--gpu-architecture={target}", *OPTIONS, *options]
    flags = (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments))
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
        )
    )
    try:
        if code := library.nvrtcCompileProgram(program, len(arguments), flags):
            lines = _log(library, program).splitlines()[:LOG_LINES]
            raise BackendUnavailableError(
                f"{name} does not compile for {target} ({_error(code)}):\n" + "\n".join(lines)
            )
        return _read(library, "PTX" if is_ptx else "CUBIN", program), _log(library, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def load() -> ctypes.CDLL:
    """The NVRTC library: the copy PyTorch has loaded, those of wheels, or the system's.

    Raises:
        BackendUnavailableError: there is none.
    """
    tried = []
    for path in _candidates():
        try:
            return _open(path)
        except OSError as error:
            tried.append(str(error))
    raise BackendUnavailableError(
        "the compiler library NVRTC is not found, which CUDA builds of PyTorch bring: "
        "pip install nvidia-cuda-nvrtc" + "".join(f"; {t}" for t in tried)
    )


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def supported_archs() -> tuple[int, ...]:
    """The compute capabilities NVRTC compiles for, as 80 for sm_80, ascending."""
    count = ctypes.c_int()
    _check(load().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    archs = (ctypes.c_int * count.value)()
    _check(load().nvrtcGetSupportedArchs(archs))
    return tuple(sorted(archs))


def _target(arch: str, supported: Sequence[int]) -> tuple[str, bool]:
    """The architecture to compile for, and whether as PTX, which the driver finishes.

    Machine code runs on later GPUs of its major version, and PTX on all later ones.
    """
    found = re.fullmatch(r"sm_(\d+)([af]?)", arch)
    if found is None:
        raise BackendUnavailableError(
            f"'{arch}' is not an architecture of a GPU: write it as sm_90"
        )
    number = int(found[1])
    if number in supported:
        return arch, False
    older = [a for a in supported if a < number]
    if not older:
        raise BackendUnavailableError(
            f"NVRTC {'.'.join(map(str, version()))} has no machine code for {arch}, its oldest is "
            f"sm_{supported[0]}: use --op triton or --op torch"
        )
    if older[-1] // 10 == number // 10 and not found[2]:
        return f"sm_{older[-1]}", False
    return f"compute_{older[-1]}", True


def _candidates() -> Iterator[Path | str]:
    folders = [folder for folder in _folders() if folder.is_dir()]
    files = [f for folder in folders for f in sorted(folder.glob(PATTERN)) if ".alt." not in f.name]
    wanted = _torch_major()
    # a newer toolkit than PyTorch's may write what the driver cannot read
    files.sort(key=lambda f: wanted is not None and _major(f) != wanted)
    loaded = _loaded()
    yield from ([loaded] if loaded else [])
    yield from files
    if system := ctypes.util.find_library("nvrtc"):
        yield system


def _folders() -> Iterator[Path]:
    """Where wheels of PyTorch and NVIDIA, conda and the toolkit put the library."""
    for package in ("nvidia", "torch"):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            root = Path(place)
            if package == "torch":
                yield root / "lib"
                continue
            yield from sorted(root.glob("cu[0-9]*/lib"), reverse=True)
            yield from sorted(root.glob("cu[0-9]*/bin/x86_64"), reverse=True)
            yield from (root / "cuda_nvrtc" / "lib", root / "cuda_nvrtc" / "bin")
    if IS_WINDOWS:
        yield Path(sys.prefix) / "Library" / "bin"
        toolkits = Path("C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA")
        yield from sorted(toolkits.glob("v*/bin"), reverse=True)
        yield from sorted(toolkits.glob("v*/bin/x64"), reverse=True)
    else:
        yield from (Path(sys.prefix) / "lib", Path("/usr/local/cuda/lib64"))


def _loaded() -> str | None:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"/\S*/libnvrtc\.so\S*", maps)
    return found[0] if found else None


def _torch_major() -> str | None:
    import torch

    return torch.version.cuda.partition(".")[0] if torch.version.cuda else None


def _major(path: Path) -> str:
    # libnvrtc.so.13, libnvrtc.so.12.8.93 or nvrtc64_120_0.dll
    found = re.search(r"\.so\.(\d+)|64_(\d\d)", path.name)
    return (found[1] or found[2]) if found else ""


def _open(path: Path | str) -> ctypes.CDLL:
    folder = Path(path).parent
    if folder.is_absolute():
        if sys.platform == "win32":
            os.add_dll_directory(str(folder))
        for builtins in sorted(folder.glob(BUILTINS)):
            if ".alt." not in builtins.name:
                # NVRTC 13 looks for them by name alone, and finds what is loaded already
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    return _read(library, "ProgramLog", program).rstrip(b"\0").decode("utf-8", "replace")


def _read(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise BackendUnavailableError(f"NVRTC: {_error(code)}")


def _error(code: int) -> str:
    message: bytes = load().nvrtcGetErrorString(code)
    return message.decode()
