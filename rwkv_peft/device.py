"""Devices and number types by the names of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rwkv_peft.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    import torch


def resolve_device(accelerator: str) -> torch.device:
    """The device for 'auto', 'cpu', 'gpu', or a type such as 'cuda', 'mps' or 'cuda:1'.

    Raises:
        BackendUnavailableError: there is no such device on this machine.
        ConfigError: the name is no type of device.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator == "auto":
        return found or torch.device("cpu")
    if accelerator == "gpu":
        if found is None:
            raise BackendUnavailableError(
                "--accelerator gpu: PyTorch finds no GPU on this machine: use --accelerator cpu, "
                "or install the PyTorch build for your GPU"
            )
        return found
    try:
        device = torch.device(accelerator)
    except RuntimeError as error:
        raise ConfigError(
            f"--accelerator {accelerator} is no device: use auto, cpu, gpu, cuda or mps"
        ) from error
    if device.type != "cpu" and (found is None or found.type != device.type):
        here = found.type if found else "none"
        raise BackendUnavailableError(
            f"--accelerator {accelerator}: this machine has no such device (accelerator found: "
            f"{here}): use --accelerator auto"
        )
    return device


def dtype_of(precision: str) -> torch.dtype:
    """The number type of a precision: fp32, tf32, bf16 or fp16 (or float32 and the like)."""
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
        raise ConfigError(f"'{precision}' is no number type: use one of {', '.join(names)}")
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
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16", "this GPU has no bf16"
    return "bf16", "half the memory of fp32, and no overflow"
