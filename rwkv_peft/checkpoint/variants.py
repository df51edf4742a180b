"""Files of RWKV that are known and cannot be used, by the marks in their tensors."""

from collections.abc import Mapping
from typing import Any

import torch

from rwkv_peft.errors import CheckpointError

_ORIGINAL = "give the original .pth, in bf16, fp16 or fp32"
_OTHER = "give a file of RWKV-7 (x070), such as rwkv7-g1d-0.1b"


def find_variant(tensors: Mapping[Any, Any]) -> tuple[str, str]:
    """What a file holds that cannot be used, and what to do; empty texts if nothing is known.

    Source of the names: RWKV-LM, `rwkv_v7a_demo.py`, `rwkv_v7b_demo.py` and `RWKV-v8`; BlinkDL's
    Albatross for the quantised ones.
    """
    names = [name.removeprefix("model.") for name in tensors if isinstance(name, str)]
    known = set(names)
    if any(name.endswith("rosa_qkv.emb") for name in names):
        return "RWKV-8 with ROSA", f"it cannot be used yet: {_OTHER}"
    if "blocks.0.qkv.qq.weight" in known:
        return (
            "RWKV-7b (DeepEmbed with an attention that keeps all past tokens)",
            f"it cannot be used, since its state is no longer of one size: {_OTHER}",
        )
    if "blocks.0.ffn.s_emb.weight" in known:
        return "RWKV-7a (DeepEmbed)", f"it cannot be used yet: {_OTHER}"
    if any(name.endswith((".nf4_b_scale", ".nvfp4_t_scale")) for name in names):
        return "quantised to NVFP4, as Albatross computes", _ORIGINAL
    is_int8 = any(
        isinstance(x, torch.Tensor) and x.dtype == torch.int8 and f"{name}_scale" in tensors
        for name, x in tensors.items()
    )
    if is_int8:
        return "quantised to INT8, as Albatross computes", _ORIGINAL
    return "", ""


def require_usable(tensors: Mapping[Any, Any], path: object) -> None:
    """Raises CheckpointError if a file is one of those that are known and cannot be used."""
    what, advice = find_variant(tensors)
    if what:
        is_model = what.startswith("RWKV")
        raise CheckpointError(f"{path} {'holds' if is_model else 'is'} {what}: {advice}")
