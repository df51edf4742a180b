"""Kernels on the GPU through NVIDIA's driver library, in PyTorch's context and on its stream."""

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.ops.cuda.build import build

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# names of the driver's header
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PARAM_END, PARAM_BUFFER_POINTER, PARAM_BUFFER_SIZE = 0, 1, 2
INVALID_CONTEXT = 201
# CUlaunchConfig: grid, block, shared memory; stream; attributes and their number
CONFIG, STREAM = struct.Struct("@7I4xPPI4x"), 32
# what a block may use without asking
SHARED_BYTES = 48 * 1024


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function on one GPU; `kernel(grid, block, *numbers)` prepares launches of it.

    Attributes:
        handle: the driver's.
        signature: see `load_kernel`.
        shared_bytes: dynamic shared memory of a block.
    """

    name: str
    handle: int
    device_index: int
    signature: str
    shared_bytes: int

    def __call__(
        self, grid: tuple[int, int, int], block: int, *numbers: float
    ) -> Callable[..., None]:
        return Launch(self, grid, block, numbers).queue


class Launch:
    """A kernel with its grid and numbers; `queue(*addresses)` puts it on the current stream.

    An address is a tensor's `data_ptr()`, or 0 for none. One thread may call it, from its own copy
    of what the driver is given; that costs about 1 µs.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, numbers: Sequence[float]
    ) -> None:
        self._kernel, self._shape = kernel, (*grid, block)
        self._index = kernel.device_index
        # the driver's CUlaunchConfig, then the kernel's parameters
        parameters, start = struct.Struct("@" + kernel.signature), CONFIG.size
        self._memory = memory = ctypes.create_string_buffer(start + parameters.size)
        CONFIG.pack_into(memory, 0, *grid, block, 1, 1, kernel.shared_bytes, 0, 0, 0)
        pointers = kernel.signature[: kernel.signature.rfind("P") + 1]
        zeros = struct.unpack_from("@" + pointers, memory, start)
        parameters.pack_into(memory, start, *zeros, *numbers)
        # what changes lies together, but for zeros: the stream, no attributes, the addresses
        self._pack_into = struct.Struct(f"@P{start - STREAM - 8}x{pointers}").pack_into
        # the array points to the size, which is kept alive with it
        self._size = ctypes.c_size_t(parameters.size)
        address, length = ctypes.addressof(memory) + start, ctypes.addressof(self._size)
        given = (PARAM_BUFFER_POINTER, address, PARAM_BUFFER_SIZE, length, PARAM_END)
        extra = ctypes.byref((ctypes.c_void_p * 5)(*given))
        # ready-made C values: ctypes then has nothing to convert, which halves the cost of a call
        self._arguments = (ctypes.byref(memory), ctypes.c_void_p(kernel.handle), None, extra)
        self._start = driver().cuLaunchKernelEx
        self._current_stream, self._current_device = _queries()

    def queue(self, *addresses: float) -> None:
        """Raises BackendUnavailableError if the driver refuses."""
        index = self._index
        if self._current_device() != index:
            with torch.cuda.device(index):
                return self.queue(*addresses)
        self._pack_into(self._memory, STREAM, self._current_stream(index), *addresses)
        code = self._start(*self._arguments)
        if code == INVALID_CONTEXT:
            # a thread in which nothing has used the GPU yet
            _enter_context(index)
            code = self._start(*self._arguments)
        if code:
            *grid, block = self._shape
            raise BackendUnavailableError(
                f"kernel {self._kernel.name} was not started: {error_name(code)} (grid "
                f"{tuple(grid)}, block {block}, {self._kernel.shared_bytes} bytes of shared memory)"
            )


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
            int, q a long long, f a float. Up to the last pointer they change with each launch.
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


def index_of(device: torch.device) -> int:
    """The number of a GPU, the current one if none is named."""
    return torch.cuda.current_device() if device.index is None else device.index


def architecture(device_index: int) -> str:
    """What kernels are compiled for on a GPU, such as 'sm_89'.

    Hopper's 'sm_90a' has instructions that no other generation has.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}{'a' * ((major, minor) == (9, 0))}"


@functools.cache
def _load_module(
    files: tuple[Path, ...], options: tuple[str, ...], device_index: int
) -> ctypes.c_void_p:
    code = build(files, arch=architecture(device_index), options=options)
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
