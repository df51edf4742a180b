"""The functions that `import rwkv_peft` offers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import load_adapter, read_adapter
from rwkv_peft.checkpoint.convert import convert
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.merge import merge
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.checkpoint.state import load_state
from rwkv_peft.checkpoint.stored import BaseAsTrained, noted_storage, storage_of
from rwkv_peft.checkpoint.stream import require_finite
from rwkv_peft.device import dtype_of
from rwkv_peft.generation.engine import generate
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.training.run import train

__all__ = ["convert", "generate", "load_model", "merge", "train"]


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    op: str = "auto",
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
    pissa_init: str | Path = "",
    state: str | Path | None = None,
    force: bool = False,
) -> RWKV:
    """The model of an official file, frozen and ready to compute.

    `model(tokens_BT, state=None)` gives logits (B, T, V) and the state after the last token.

    Args:
        path: an official .pth or .safetensors file.
        dtype: a torch dtype or its name; 'bf16', 'fp16' and 'fp32' work too.
        op: backend of the recurrence: auto, cuda, triton, fla, torch or reference.
        adapter: folder of an adapter in peft's format to attach, or a file of older RWKV-PEFT. If
            its base was stored in 8 or 4 bits in training, the weights are those of then, dense.
        lora_alpha: of such a file's training, which a LoRA file does not hold.
        pissa_init: for PiSSA in its place, the run's init_pissa.pth.
        state: file of a learned state in which every text begins; with weights as of an adapter.
        force: attach an adapter that was trained on another base.
    Raises:
        CheckpointError: a file cannot be read or does not fit.
        BackendUnavailableError: `op` cannot serve on this device and type.
    """
    dtype = dtype_of(dtype) if isinstance(dtype, str) else dtype
    weights = read_weights(path)
    model = build(infer_model_config(weights), op=op, device=device, dtype=dtype)
    values: Mapping[str, Tensor] = weights
    if state is not None and (storage := noted_storage(state)):
        values = BaseAsTrained(weights, storage)
    if adapter is not None:
        hints = LegacyAdapterHints(lora_alpha, pissa_init)
        own = fingerprint(weights)
        saved = read_adapter(adapter, hints, base_fingerprint=own, force=force)
        if storage := storage_of(saved.note, adapter):
            values = BaseAsTrained(weights, storage, saved)
    load_weights(model, values, device=device, dtype=dtype)
    require_finite(dict(model.named_parameters()), path, weights)
    if adapter is not None:
        load_adapter(model, saved, adapter)
    if state is not None:
        load_state(model, state)
    return model.eval()
