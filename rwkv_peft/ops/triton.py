"""What the Triton backends of all operators share: when they can serve, and quick launches."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.errors import ShapeError
from rwkv_peft.ops.dispatch import Request, is_installed

HEAD_SIZE = 64
OLDEST = 80  # NVIDIA's Ampere, the oldest that Triton supports
NOTE = "Triton kernels, parallel over time; compiled at the first step, which takes seconds"


def objection(request: Request, *, shared_memory: int) -> str | None:
    """Why Triton kernels cannot serve a request; None if they can.

    Args:
        shared_memory: bytes of it that the largest kernel needs.
    """
    if request.device.type == "cpu":
        return "needs a GPU"
    if not is_installed("triton"):
        return "is not installed (pip install triton)"
    if request.head_size != HEAD_SIZE:
        return f"needs head size {HEAD_SIZE}, got {request.head_size}"
    if request.dtype == torch.float64:
        return "computes in float32 at most, not in float64"
    try:
        arch, found = _of_device(request.device)
    except RuntimeError as error:
        return f"has no driver for {request.device.type}: {error}"
    if isinstance(arch, int) and arch < OLDEST:
        return f"needs compute capability {OLDEST / 10}, and this GPU has {arch / 10}"
    if found < shared_memory:
        return f"needs {shared_memory} bytes of shared memory, and this GPU has {found}"
    return None


def _of_device(device: torch.device) -> tuple[object, int]:
    """Triton's name of a device's kind (NVIDIA: 10 times the compute capability), shared bytes."""
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index or 0)
    return driver.active.get_current_target().arch, properties["max_shared_mem"]


def require_head_size(size: int) -> None:
    """Raises ShapeError unless a head has 64 channels."""
    if size != HEAD_SIZE:
        raise ShapeError(f"op='triton' needs head size {HEAD_SIZE}, got {size}: use --op torch")


# a kernel and the arguments that it is compiled for: tensors and numbers by their types, constants
Variant = tuple["Launcher", tuple[Any, ...]]


class Launcher:
    """Launches a Triton kernel and keeps what was compiled, which saves most of Triton's time.

    Args:
        kernel: a `triton.jit` function of tensors, numbers and constants, in this order. It must
            not be specialised on the numbers: what was compiled is used for all of their values.
        num_warps, num_stages: how it is compiled.
        is_fused: a product and a sum may be one operation, which rounds once.
    """

    def __init__(
        self, kernel: Any, num_warps: int, num_stages: int = 2, *, is_fused: bool = True
    ) -> None:
        import triton

        self.kernel = kernel
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        if not is_fused:
            self.options["enable_fp_fusion"] = False
        self.is_compiled = isinstance(kernel, triton.JITFunction)
        self._found: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
    ) -> None:
        arguments = (*tensors, *numbers, *constants)
        device = tensors[0].device
        if not self.is_compiled:  # Triton's interpreter
            self.kernel[grid](*arguments, **self.options)
            return
        if torch.accelerator.current_device_index() != device.index:
            with torch.accelerator.device_index(device.index):
                return self(grid, tensors, numbers, constants)
        key = (device.index, constants, *[x.dtype for x in tensors])
        # Triton compiles for addresses that are a multiple of 16, or again for others
        is_aligned = not any(x.data_ptr() % 16 for x in tensors)
        if is_aligned and (compiled := self._found.get(key)) is not None:
            compiled[grid](*arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)
        if is_aligned:
            self._found[key] = compiled


class Settings(NamedTuple):
    """How kernels compute for inputs of a dtype."""

    chunk: int
    operand: Any  # dtype of the operands of products, see `triton_kernels`
    precision: str  # of products whose operands are float32


@functools.cache
def dot_precisions() -> tuple[str, ...]:
    """How Triton can multiply float32 on the current device, in the words of `input_precision`."""
    from triton.compiler import make_backend
    from triton.runtime import driver

    options = make_backend(driver.active.get_current_target()).parse_options({})
    return tuple(getattr(options, "allowed_dot_input_precisions", ()))


class Scan:
    """The scan over the states of an operator.

    Args:
        rows: rows of a state that a program computes.
        num_warps: warps of a program.
        stages: chunks held at a time, all but one of them fetched ahead.
        has_transition: whether the state is multiplied by a matrix of each chunk.
    """

    def __init__(self, rows: int, num_warps: int, stages: int, *, has_transition: bool) -> None:
        from rwkv_peft.ops.triton_kernels import scan

        self._launcher = Launcher(scan, num_warps)
        self._rows, self._stages, self._has_transition = rows, stages, has_transition

    def __call__(
        self,
        settings: Settings,
        transition: Tensor | None,
        added: Tensor,
        decay: Tensor,
        start: Tensor | None,
        states: Tensor,
        end: Tensor,
        *,
        reverse: bool,
    ) -> None:
        B, H, M, N = decay.shape
        tensors = (transition, added, decay, start, states, end)
        constants = self._constants(settings, start is not None, reverse)
        self._launcher((B * H, N // self._rows, 1), replace_none(tensors, end), (M,), constants)

    def variants(self, settings: Settings, matrix: str) -> Iterator[Variant]:
        """All that it is compiled to for matrices of a dtype."""
        wide = "*fp32"
        for reverse in (False, True):
            constants = self._constants(settings, True, reverse)
            tensors = (matrix, matrix, wide, wide, matrix, wide)
            yield self._launcher, (*tensors, "i32", *constants)

    def _constants(self, settings: Settings, has_start: bool, reverse: bool) -> tuple[Any, ...]:
        flags = (self._has_transition, has_start, reverse)
        return HEAD_SIZE, self._rows, *flags, *settings[1:], self._stages


def start_chunks(
    launcher: Launcher,
    settings: Settings,
    tensors: tuple[Tensor | None, ...],
    like: Tensor,
    *flags: bool,
    parts: int = 1,
) -> None:
    """Launches `parts` programs of a kernel for each chunk of inputs like `like` (B, T, H, N)."""
    B, T, H, N = like.shape
    require_head_size(N)
    C, operand, precision = settings
    M = (T + C - 1) // C
    constants = (C, N, *flags, operand, precision)
    launcher((B * M * H * parts, 1, 1), replace_none(tensors, like), (T, H, M), constants)


def replace_none(tensors: tuple[Tensor | None, ...], other: Tensor) -> tuple[Tensor, ...]:
    """The tensors with another in place of None; flags tell the kernels that it is not used."""
    return tuple([other if x is None else x for x in tensors])
