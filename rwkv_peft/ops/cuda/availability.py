"""Whether kernels for NVIDIA GPUs can serve."""

import torch

from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.ops.cuda import driver, nvrtc
from rwkv_peft.ops.dispatch import Request

# Ampere, the first with bf16 matrix units and asynchronous copies
OLDEST = (8, 0)


def objection(request: Request, *, oldest: tuple[int, int] = OLDEST) -> str | None:
    """Why the CUDA kernels of an operator cannot serve a request; None if they can.

    Args:
        oldest: compute capability that the kernels need.
    """
    if request.device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if request.head_size != 64:
        return f"needs head size 64, got {request.head_size}"
    if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no kernels for {str(request.dtype).removeprefix('torch.')}"
    try:
        driver.driver()
        nvrtc.load()
    except BackendUnavailableError as error:
        return f"cannot start: {error}"
    found = torch.cuda.get_device_capability(request.device)
    if found < oldest:
        wanted, got = (".".join(map(str, c)) for c in (oldest, found))
        return f"needs compute capability {wanted}, and this GPU has {got}"
    return None


def versions() -> dict[str, str]:
    """Versions of what the kernels rest on, or why it is not here."""
    found = {"toolkit of torch": torch.version.cuda or torch.version.hip or "none"}
    for name, query in (("NVIDIA driver", driver.version), ("NVRTC", nvrtc.version)):
        try:
            found[name] = ".".join(map(str, query()))
        except BackendUnavailableError:
            found[name] = "not found"
    return found
