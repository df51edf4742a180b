"""Learned states and LoRA as files of their own, without a model."""

import re
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import attach_to_base, read_adapter
from rwkv_peft.checkpoint.convert import to_plain_lora
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.checkpoint.stream import require_finite
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.exports import st
from rwkv_peft.exports.formats import write_stored
from rwkv_peft.exports.stored import all_mapped, mapped

# formats of states, with the ends of the names of their files, and the dtype in which each is
STATE_ENDINGS = {"st": ".state", "pth": ".pth"}
STATE_DTYPES = {"st": "fp16", "pth": "fp32"}
# what Ai00 multiplies by alpha / R; a LoRA on anything else is added as it is
_SCALED = re.compile(r"blocks\.\d+\.(att|ffn)\.(key|value|receptance|gate|output)")
# how far the product of factors in fp16 may be from that of the adapter's own, relative
_FP16 = 4e-3


def read_time_states(path: Path, to: str) -> dict[str, Tensor]:
    """The tensors of a state file as other programs take them, one a layer.

    Raises:
        ConfigError: the programs of this format read no state.
        CheckpointError: the file holds more than these tensors.
    """
    if to not in STATE_ENDINGS:
        raise ConfigError(
            f"{path} is a learned state, and --to {to} is for models: programs that read states "
            f"take --to {' or '.join(STATE_ENDINGS)}; rwkv-peft merge adds it to a .pth"
        )
    found = read_weights(path)
    plain = [f"blocks.{i}.att.time_state" for i in range(len(found))]
    if set(found) != set(plain):
        extra = next(name for name in found if name not in plain)
        raise CheckpointError(
            f"{path} holds {extra}, and other programs read one time_state a layer alone: train it "
            "by --peft state, not by fullstate"
        )
    require_finite(found, path)
    return {name: found[name] for name in plain}


def write_states(file: IO[bytes], states: dict[str, Tensor], to: str) -> str:
    """Writes a state into an open file, and gives a line on how exactly."""
    tensors = st.state_to_foreign(states) if to == "st" else all_mapped(states)
    dtype = st.DTYPE if to == "st" else torch.float32
    write_stored(file, tensors, dict.fromkeys(tensors, dtype), is_safetensors=to == "st")
    file.flush()
    largest = max(x.abs().max().item() for x in states.values())
    written = read_back(Path(file.name), to)
    worst = max((written[n] - x.float()).abs().max().item() for n, x in states.items())
    expected = torch.finfo(dtype).eps * largest
    if not worst <= expected:
        raise CheckpointError(f"the exported state differs by {worst:g}, expected is {expected:g}")
    return f"read back: values differ by at most {worst:.2g}, expected up to {expected:.2g}"


def read_back(path: Path, to: str) -> dict[str, Tensor]:
    """The official tensors of a file of states or of a LoRA, in float32."""
    from rwkv_peft.exports.formats import FORMATS

    return {name: x.whole().float() for name, x in FORMATS[to].read(path).items()}


def make_lora(
    path: Path, base_model: str | Path, hints: LegacyAdapterHints, force: bool
) -> tuple[dict[str, Tensor], float]:
    """The factors and vectors of an adapter under official names, and the alpha for Ai00.

    Raises:
        CheckpointError: Ai00 would not compute what the adapter computes.
    """
    weights = read_weights(base_model)
    adapter = read_adapter(path, hints, base_fingerprint=fingerprint(weights), force=force)
    model = attach_to_base(weights, adapter, path)[0]
    factors, own, alpha = to_plain_lora(path, weights, model, adapter)
    modules = {name.rpartition(".")[0] for name in factors}
    wrong = [m for m in sorted(modules) if not _SCALED.fullmatch(m)]
    wrong += [name for name, x in own.items() if x.numel() != x.shape[-1]]
    if wrong:
        raise CheckpointError(
            f"{path} changes {wrong[0]}, which Ai00 adds in another way or not at all: leave "
            "--merge 0 out, which writes a merged model"
        )
    return factors | own, alpha


def write_lora(file: IO[bytes], tensors: dict[str, Tensor]) -> str:
    """Writes a LoRA into an open file as Ai00 reads it, and gives a line on how exactly."""
    foreign = {
        name.replace(".lora_A", ".lora.0").replace(".lora_B", ".lora.1"): mapped(
            x.t() if name.endswith(".lora_A") else x
        )
        for name, x in tensors.items()
    }
    write_stored(file, foreign, dict.fromkeys(foreign, st.DTYPE))
    file.flush()
    written = read_back(Path(file.name), "st")
    worst = 0.0
    for name in (n for n in tensors if n.endswith(".lora_A")):
        other = name.replace(".lora_A", ".lora_B")
        wanted = tensors[other].float() @ tensors[name].float()
        error = (written[other] @ written[name] - wanted).norm() / wanted.norm().clamp_min(1e-30)
        worst = max(worst, error.item())
    if not worst <= _FP16:
        raise CheckpointError(f"the exported LoRA differs by {worst:.2g}, expected is {_FP16:g}")
    return f"read back: products differ by at most {worst:.2g} of themselves, expected {_FP16:g}"
