"""`.st` of Ai00 and web-rwkv: safetensors in fp16, of models, learned states and LoRA.

Source of names and transposes: web-rwkv, `assets/scripts/convert_safetensors.py` and
`src/runtime/loader.rs`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.exports.layout import TRANSPOSED, Form, Layout, Rule, rule
from rwkv_peft.exports.stored import Stored, all_mapped, mapped
from rwkv_peft.models.config import ModelConfig

ENDINGS = (".st", ".state")
STATE = rule("blocks.{i}.att.time_state", "blocks.{i}.att.time_state", TRANSPOSED)
# older files of RWKV-5 hold the logarithm of what web-rwkv wants; it comes back as time_faaaa
_EXP = Form(lambda xs, i: xs[0].float().exp(), lambda x, i, n: (x.log(),))


def _renamed(part: str, *names: str) -> tuple[Rule, ...]:
    old, new = part.split(">")
    return tuple(rule(f"blocks.{{i}}.{n}", f"blocks.{{i}}.{n}".replace(old, new)) for n in names)


_RWKV7 = Layout(
    tuple(
        rule(f"blocks.{{i}}.att.{x}{n}", f"blocks.{{i}}.att.{x}{n}", TRANSPOSED)
        for x in "wavg"
        for n in "12"
    )
)
_RWKV6 = Layout(
    (
        rule("blocks.{i}.att.time_faaaa", "blocks.{i}.att.time_first"),
        *_renamed("time_maa>time_mix", *(f"att.time_maa_{x}" for x in "xwkvrg")),
        *_renamed("time_maa>time_mix", "ffn.time_maa_k", "ffn.time_maa_r"),
        *(
            rule(f"blocks.{{i}}.att.{a}_w{n}", f"blocks.{{i}}.att.{b}_w{n}", TRANSPOSED)
            for a, b in (("time_maa", "time_mix"), ("time_decay", "time_decay"))
            for n in "12"
        ),
    )
)


def _rwkv5(model_config: ModelConfig) -> Layout:
    """The layout of RWKV-5; the one number of a head in 5.1 is repeated for its channels."""
    N = model_config.head_size

    def spread(x: Tensor) -> Tensor:
        return x if x.ndim == 2 and x.shape[1] == N else x.reshape(-1, 1).expand(-1, N)

    same = Form(lambda xs, i: spread(xs[0]), lambda x, i, n: (x,))
    first, decay = "blocks.{i}.att.time_first", "blocks.{i}.att.time_decay"
    exp = Form(lambda xs, i: spread(_EXP.to(xs, i)), _EXP.back)
    return Layout(
        (
            rule("blocks.{i}.att.time_faaaa", first, same),
            Rule(("blocks.{i}.att.time_first",), first, exp, is_copy=True),
            rule(decay, decay, same),
        )
    )


def layout_of(model_config: ModelConfig) -> Layout:
    """The layout of a version."""
    if model_config.version == "x070":
        return _RWKV7
    return _RWKV6 if model_config.version == "x060" else _rwkv5(model_config)


def is_layout(tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether the tensors of a safetensors file are named and lie as in Ai00's.

    Some publish official tensors as `.st`: in RWKV-7 the shapes tell.
    """
    emb, w1 = tensors.get("emb.weight"), tensors.get("blocks.0.att.w1")
    if emb is not None and w1 is not None:
        return w1.shape[0] != emb.shape[1]
    marks = ("blocks.0.att.time_mix_x", "blocks.0.att.time_mix_w1")
    is_named = path.suffix.lower() in ENDINGS
    is_lora = any(name.endswith(".lora.0") for name in tensors)
    return is_named or is_lora or any(mark in tensors for mark in marks)


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The official tensors of Ai00's: a model, a state or a LoRA as RWKV-PEFT once wrote it."""
    stored = all_mapped(tensors)
    if any(name.endswith(".lora.0") for name in tensors):
        return {
            name.replace(".lora.0", ".lora_A").replace(".lora.1", ".lora_B"): x
            if not name.endswith(".lora.0")
            else mapped(tensors[name].t())
            for name, x in stored.items()
        }
    if "blocks.0.att.w1" in tensors:
        layout = _RWKV7
    else:
        is_6 = "blocks.0.att.time_mix_x" in tensors
        renames = rule("blocks.{i}.att.time_faaaa", "blocks.{i}.att.time_first")
        layout = _RWKV6 if is_6 else Layout((renames,))
    return Layout((*layout.rules, STATE)).to_official(stored, 0)


def state_to_foreign(states: Mapping[str, Tensor]) -> dict[str, Stored]:
    """A learned state as Ai00 takes it."""
    return Layout((STATE,)).to_foreign(all_mapped(states))


DTYPE = torch.float16
