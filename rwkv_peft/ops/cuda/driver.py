"""Kernels on the GPU through NVIDIA's driver library, in PyTorch's context and on its stream."""

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.ops.cuda.build import build

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# names of the driver's header
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PARAM_END, PARAM_BUFFER_POINTER, PARAM_BUFFER_SIZE = 0, 1, 2
INVALID_CONTEXT = 201
# what a block may use without asking
SHARED_BYTES = 48 * 1024


class Kernel:
    """A function on one GPU; `kernel(grid, block, *args)` queues it on PyTorch's current stream.

    Args are numbers in the order of the signature, a tensor as its `data_ptr()`, and 0 for none.
    It may be called from any thread, and costs about 2 µs.
    """

    def __init__(
        self, name: str, handle: int, device_index: int, signature: str, shared_bytes: int
    ) -> None:
        self.name = name
        self.device_index = device_index
        self._layout = struct.Struct("@" + signature)
        self._shared_bytes = shared_bytes
        # ready-made C values: ctypes then has nothing to convert, which halves the cost of a call
        self._handle, self._null = ctypes.c_void_p(handle), ctypes.c_void_p()
        self._launch = driver().cuLaunchKernel
        self._stream, self._current_device = _queries()
        # autograd's backward runs in threads of its own
        self._threads = threading.local()

    def __call__(self, grid: tuple[int, int, int], block: int, *args: float) -> None:
        if self._current_device() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(grid, block, *args)
        try:
            packed, extra, _ = self._threads.buffers
        except AttributeError:
            packed, extra, _ = self._new_buffers()
        self._layout.pack_into(packed, 0, *args)
        x, y, z = grid
        given = (self._handle, x, y, z, block, 1, 1, self._shared_bytes)
        stream = ctypes.c_void_p(self._stream(self.device_index))
        code = self._launch(*given, stream, self._null, extra)
        if code == INVALID_CONTEXT:
            # a thread in which nothing has used the GPU yet
            _enter_context(self.device_index)
            code = self._launch(*given, stream, self._null, extra)
        if code:
            raise BackendUnavailableError(
                f"kernel {self.name} was not started: {error_name(code)} (grid {grid}, block "
                f"{block}, {self._shared_bytes} bytes of shared memory)"
            )

    def _new_buffers(self) -> tuple[Any, ...]:
        packed = ctypes.create_string_buffer(max(self._layout.size, 1))
        size = ctypes.c_size_t(self._layout.size)
        pointer, length = ctypes.addressof(packed), ctypes.addressof(size)
        given = (PARAM_BUFFER_POINTER, pointer, PARAM_BUFFER_SIZE, length, PARAM_END)
        # the size is kept alive with the array that points to it
        self._threads.buffers = buffers = packed, (ctypes.c_void_p * 5)(*given), size
        return buffers


@functools.cache
def load_kernel(
    files: tuple[Path, ...],
    name: str,
    *,
    device_index: int,
    signature: str,
    shared_bytes: int = 0,
    options: tuple[str, ...] = (),
) -> Kernel:
    """The kernel `name` of some `.cu` files, compiled for a GPU and loaded there, once a process.

    Args:
        files: compiled as one source; see `build`.
        signature: the kernel's parameters in the letters of Python's `struct`: P a pointer, i an
            int, q a long long, f a float.
        shared_bytes: dynamic shared memory of a block.
        options: of NVRTC, such as '-DC=64'.
    Raises:
        BackendUnavailableError: there is no driver or compiler library, the source does not
            compile, or the GPU has less shared memory; the message names CUDA's error.
    """
    module = _load_module(files, options, device_index)
    function = ctypes.c_void_p()
    what = f"kernel {name} of {files[0].name}"
    check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), what)
    if shared_bytes > SHARED_BYTES:
        code = driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        check(code, f"{what} with {shared_bytes} bytes of shared memory")
    assert function.value is not None
    return Kernel(name, function.value, device_index, signature, shared_bytes)


@functools.cache
def _load_module(
    files: tuple[Path, ...], options: tuple[str, ...], device_index: int
) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device_index)
    code = build(files, arch=f"sm_{major}{minor}", options=options)
    module = ctypes.c_void_p()
    with torch.cuda.device(device_index):
        _enter_context(device_index)
        check(driver().cuModuleLoadData(ctypes.byref(module), code), files[0].name)
    return module


@functools.cache
def driver() -> ctypes.CDLL:
    """NVIDIA's driver library.

    Raises:
        BackendUnavailableError: this machine has none.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BackendUnavailableError(f"NVIDIA's driver is not found: {error}") from error
    # PyTorch has done so; it costs nothing again
    check(library.cuInit(0), "the driver", library)
    return library


def version() -> tuple[int, int]:
    """Major and minor version of CUDA that the driver serves."""
    number = ctypes.c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(number)), "the driver")
    return number.value // 1000, number.value % 1000 // 10


def check(code: int, what: str, library: ctypes.CDLL | None = None) -> None:
    """Raises BackendUnavailableError with CUDA's name of an error, unless `code` is 0."""
    if code:
        raise BackendUnavailableError(f"{what}: {error_name(code, library)}")


def error_name(code: int, library: ctypes.CDLL | None = None) -> str:
    """CUDA's name of an error and what it means."""
    said = []
    for function in ("cuGetErrorName", "cuGetErrorString"):
        text = ctypes.c_char_p()
        getattr(library or driver(), function)(code, ctypes.byref(text))
        said.append(text.value.decode() if text.value else f"error {code}")
    return f"{said[0]} ({said[1]})"


def _enter_context(device_index: int) -> None:
    """Makes the context that PyTorch uses on a GPU the current one of this thread."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(device), device_index), f"GPU {device_index}")
    code = driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    check(code, f"the context of GPU {device_index}")
    check(driver().cuCtxSetCurrent(context), f"the context of GPU {device_index}")


def _queries() -> tuple[Callable[[int], int], Callable[[], int]]:
    """Functions for the current stream of a GPU, as an address, and for the current GPU."""
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if stream is None:

        def stream(index: int) -> int:
            return torch.cuda.current_stream(index).cuda_stream

    return stream, getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
