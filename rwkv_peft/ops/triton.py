"""What the Triton backends of all operators share: their objections, and quick launches."""

from typing import Any

import torch
from torch import Tensor

from rwkv_peft.errors import ShapeError
from rwkv_peft.ops.dispatch import Request, is_installed

HEAD_SIZE = 64
NOTE = "Triton kernels, parallel over time; compiled at the first step, which takes seconds"


def objection(request: Request) -> str | None:
    """Why Triton kernels cannot serve a request; None if they can."""
    if request.device.type == "cpu":
        return "needs a GPU"
    if not is_installed("triton"):
        return "is not installed (pip install triton)"
    if request.head_size != HEAD_SIZE:
        return f"needs head size {HEAD_SIZE}, got {request.head_size}"
    if request.dtype == torch.float64:
        return "computes in float32 at most, not in float64"
    return None


def require_head_size(size: int) -> None:
    """Raises ShapeError unless a head has 64 channels."""
    if size != HEAD_SIZE:
        raise ShapeError(f"op='triton' needs head size {HEAD_SIZE}, got {size}: use --op torch")


class Launcher:
    """Starts a Triton kernel; what was compiled is kept by key, which spares most of Triton's time.

    Args:
        kernel: a `triton.jit` function whose tensors come first, then numbers, which it must be
            told not to specialise on: what was compiled is used for all of their values; then
            constants.
        num_warps, num_stages: how it is compiled.
    """

    def __init__(self, kernel: Any, num_warps: int, num_stages: int = 2) -> None:
        import triton

        self.kernel = kernel
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.is_compiled = isinstance(kernel, triton.JITFunction)
        self._found: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
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
