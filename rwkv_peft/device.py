"""Devices and dtypes by the names of the command line."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_peft.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    import torch


# names that --accelerator takes, besides auto and gpu
TYPES = ("cpu", "cuda", "mps", "xpu", "musa", "npu")
# what the driver of an NVIDIA card makes: on Linux, in WSL, on Windows
NVIDIA_FILES = (
    "/dev/nvidia0",
    "/proc/driver/nvidia/version",
    "/usr/lib/wsl/lib/libcuda.so.1",
    "C:/Windows/System32/nvcuda.dll",
)
_CGROUP = Path("/sys/fs/cgroup")
# AMD's cards whose FP8 is that of others (e4m3fn)
FP8_OF_AMD = ("gfx950", "gfx1200", "gfx1201")
# devices that another package brings into PyTorch
PLUGINS = {"musa": "torch_musa", "npu": "torch_npu"}


def resolve_device(accelerator: str) -> torch.device:
    """The device for 'auto', 'cpu', 'gpu', or a type such as 'cuda', 'mps' or 'cuda:1'.

    Packages that bring a device into PyTorch, torch_musa (Moore Threads) and torch_npu (Ascend)
    are imported where PyTorch finds no device by itself, and when their device is asked for.

    Raises:
        BackendUnavailableError: there is no such device on this machine.
        ConfigError: the name is not a type of device.
    """
    import torch

    from rwkv_peft.ops.dispatch import is_installed

    kind, _, index = accelerator.partition(":")
    if kind not in ("auto", "gpu", *TYPES) or (
        index and (kind not in TYPES or not index.isdigit())
    ):
        raise ConfigError(
            f"--accelerator {accelerator} is not a device: use auto, gpu, {', '.join(TYPES)}, or "
            "one of several as in cuda:1"
        )
    if kind == "cpu":
        return torch.device("cpu")
    if kind in PLUGINS:
        _import_plugin(kind)
    elif not torch.accelerator.is_available():
        for plugin in PLUGINS:
            if is_installed(PLUGINS[plugin]):
                _import_plugin(plugin)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "auto":
        if found is None and (problem := find_card_problem()):
            warnings.warn(problem, stacklevel=2)
        return found or torch.device("cpu")
    if found is None or kind not in ("gpu", found.type):
        here, instead = (found.type, found.type) if found else ("none", "cpu")
        raise BackendUnavailableError(
            f"--accelerator {accelerator}: PyTorch finds no such device on this machine (it finds "
            f"{here}): use --accelerator {instead}, or install the PyTorch build for your GPU"
            + (f"; {problem}" if found is None and (problem := find_card_problem()) else "")
        )
    if index and int(index) >= (count := torch.accelerator.device_count()):
        raise BackendUnavailableError(
            f"--accelerator {accelerator}: this machine has {count} of them, counted from 0"
        )
    return torch.device(accelerator) if index else found


def find_card_problem() -> str:
    """Why PyTorch does not use the NVIDIA card of this machine; "" if it has none, or does."""
    import torch

    if torch.accelerator.is_available() or not _has_nvidia_card():
        return ""
    # one of NVIDIA's own variables hides cards on purpose
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ""
    built_for = getattr(torch.version, "cuda", None)
    if built_for is None:
        return (
            f"this machine has an NVIDIA card, and PyTorch {torch.__version__} is a build without "
            "CUDA, so that the card is not used: install the build for it as docs/install.md says"
        )
    return (
        f"this machine has an NVIDIA card, which PyTorch {torch.__version__} for CUDA "
        f"{built_for} cannot use: its driver is too old or not loaded (nvidia-smi says "
        "its version): see docs/install.md"
    )


def _has_nvidia_card() -> bool:
    return any(Path(path).exists() for path in NVIDIA_FILES)


def _import_plugin(kind: str) -> None:
    from rwkv_peft.ops.dispatch import is_installed

    package = PLUGINS[kind]
    if not is_installed(package):
        raise BackendUnavailableError(
            f"--accelerator {kind} needs the package {package}, which is not installed"
        )
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendUnavailableError(
            f"{package} is installed but cannot be loaded ({reason[0]}): mend it, or use "
            "--accelerator cpu"
        ) from error


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a precision: fp32, tf32, bf16 or fp16 (or float32 and the like)."""
    import torch

    names = {
        "fp32": torch.float32,
        "tf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if precision not in names:
        raise ConfigError(f"'{precision}' is not a dtype: use one of {', '.join(names)}")
    return names[precision]


def choose_precision(device: torch.device) -> tuple[str, str]:
    """The precision that suits a device, and why."""
    import torch

    if device.type == "cpu":
        # not in every supported PyTorch
        found: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
        if found.get("avx512_bf16") or found.get("amx_bf16"):
            return "bf16", "this CPU multiplies bf16 faster than fp32, in half the memory"
        return "fp32", "this CPU has no bf16 arithmetic"
    if not has_bf16(device):
        return "fp16", "this device has no bf16"
    return "bf16", "half the memory of fp32, and no overflow"


def has_bf16(device: torch.device) -> bool:
    """Whether an accelerator computes in bf16 itself; one that cannot be asked is taken to."""
    import torch

    query = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if query is None:
        return True
    # PyTorch can emulate it, at the price of time
    without = {"including_emulation": False}
    return bool(query(**without if without.keys() <= signature(query).parameters.keys() else {}))


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Runs on another stream than the default one, on which nothing can be captured."""
    import torch

    if not has_graphs(device):
        yield
        return
    module = torch.get_device_module(device)
    # before other streams, such as that which makes weights dense beside it
    with _on(module.Stream(device, priority=-1), device):
        # autograd's thread gets its context from its first kernel, unless that is a product
        torch.ones((), device=device, requires_grad=True).square().backward()
        yield


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """Runs on the default stream, for packages whose kernels know no other."""
    import torch

    if not has_graphs(device):
        yield
        return
    with _on(torch.get_device_module(device).default_stream(device), device):
        yield


@contextmanager
def _on(stream: Any, device: torch.device) -> Iterator[None]:
    """Runs on a stream of a device, in the order of what the current one does before and after."""
    import torch

    module = torch.get_device_module(device)
    before = module.current_stream(device)
    stream.wait_stream(before)
    with module.stream(stream):
        yield
    before.wait_stream(stream)


def use_expandable_segments() -> None:
    """Has PyTorch lay tensors on an NVIDIA card without gaps; to be called before it finds one.

    Else two matrices of 8 MiB, as 1.5B has them, take a segment of 20.
    """
    if any(Path(name).exists() for name in NVIDIA_FILES[:2]):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def free_cache(device: torch.device) -> None:
    """Gives back the memory that an allocator keeps and nothing lies in, where it can."""
    import torch

    if device.type != "cpu" and hasattr(torch.get_device_module(device), "empty_cache"):
        torch.get_device_module(device).empty_cache()


def has_graphs(device: torch.device) -> bool:
    """Whether a device captures its kernels in graphs, as NVIDIA's and AMD's do."""
    import torch

    return device.type != "cpu" and hasattr(torch.get_device_module(device), "CUDAGraph")


class _HostMemory:
    """Pinned memory of the host by the protocol by which arrays of CUDA are handed over."""

    def __init__(self, pinned: torch.Tensor) -> None:
        self.pinned = pinned
        self.__cuda_array_interface__ = {
            "shape": (pinned.numel(),),
            "typestr": "|u1",
            "data": (pinned.data_ptr(), False),
            "version": 3,
        }


def has_host_memory(device: torch.device) -> bool:
    """Whether a device reads the host's memory by itself, as `leave_on_host` has it do."""
    return device.type == "cuda"


def leave_on_host(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor in pinned memory of the host, as a tensor of a GPU.

    The GPU reads it over the bus, where it takes part in graphs as any other does. It is for what
    is seldom read.
    """
    import torch

    pinned = x.cpu().contiguous().pin_memory()
    flat = torch.as_tensor(_HostMemory(pinned.view(-1).view(torch.uint8)), device=device)
    return flat.view(x.dtype).view(x.shape)


def fp8_objection(device: torch.device) -> str:
    """Why a device has no products of FP8, as the rest of a sentence; "" if it has."""
    import torch

    if device.type != "cuda":
        return f"{device.type} has not"
    properties = torch.get_device_module(device).get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
        return "" if name in FP8_OF_AMD else f"{name} has not"
    found = properties.major, properties.minor
    if found >= (8, 9):
        return ""
    return f"compute capability {found[0]}.{found[1]} has not (Ada, Hopper and later have)"


def missing_compiler(device: torch.device) -> str:
    """What `torch.compile` lacks to make kernels for a device; "" if nothing.

    Triton compiles a piece of C against Python's headers when it first runs.
    """
    import shutil
    import sysconfig

    from rwkv_peft.ops.dispatch import is_installed

    names = [os.environ.get("CXX" if device.type == "cpu" else "CC", ""), "gcc", "clang", "cc"]
    if not any(name and shutil.which(name) for name in names):
        return "a C compiler"
    if device.type == "cpu":
        return ""
    if not is_installed("triton"):
        return "Triton"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the headers of Python"
    return ""


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, on a CPU those of the machine; None if nobody can say."""
    if device.type == "cpu":
        return free_host_memory()
    import torch

    query = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if query is None else int(query(device)[0])


def free_host_memory() -> int | None:
    """Bytes that are free on this machine, or in the container; None if nobody can say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = dict(line.split(":") for line in lines)
    free = int(found["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (
            int((_CGROUP / name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
        held = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        # no container, or one without a limit
        return free
    # files that were read and can be read again
    cache = dict(line.split() for line in held).get("inactive_file", "0")
    return min(free, max(0, limit - used + int(cache)))


def process_memory() -> int:
    """Most bytes of memory that this process has held, with files that it maps; 0 if unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0


@contextmanager
def full_float32() -> Iterator[None]:
    """Has products of float32 be exact to float32 inside, where a run may use TF32 otherwise."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
