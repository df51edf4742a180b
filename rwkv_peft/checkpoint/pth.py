"""Official weight files: `.pth` and `.safetensors` of tensors under their official names."""

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.checkpoint.records import damage_in_one_line, map_pth
from rwkv_peft.checkpoint.stream import Spec, map_safetensors, write_tensors
from rwkv_peft.checkpoint.validate import join_problems, validate_weights
from rwkv_peft.checkpoint.variants import require_usable
from rwkv_peft.errors import CheckpointError
from rwkv_peft.exports.opened import (
    SAFETENSORS_ENDINGS,
    is_model_folder,
    open_folder,
    to_official,
)
from rwkv_peft.models import build, read_model_config
from rwkv_peft.models.awaited import AwaitedLinear
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.quant import Storage, quantise, stored_layers
from rwkv_peft.recognise import OLD_TORCH, SAFETENSORS, TORCH, Kind, recognise

# end of the names of a learned state's tensors
STATE_SUFFIX = "_state"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The official tensors of a file in its own order, mapped from disk rather than read.

    A `.st` of Ai00 and the folder of a Hugging Face model are opened too; see `exports`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds anything but tensors or a
            model that is known and cannot be used.
    """
    path = Path(path)
    if is_model_folder(path):
        with damage_in_one_line(path):
            found = open_folder(path)
        require_usable(found, path)
        return validate_weights(found, path, sum(x.stat().st_size for x in path.iterdir()))
    kind = require_weights(path)
    with damage_in_one_line(path):
        loaded = _READERS[kind](path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a table of tensors")
    require_usable(loaded, path)
    found = validate_weights(loaded, path, path.stat().st_size)
    return to_official(found, path) if kind is SAFETENSORS else found


def require_weights(path: str | Path) -> Kind:
    """The format of a file of weights.

    Raises:
        CheckpointError: it is missing, something else, or has the name of the other format.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    kind = recognise(path)
    if kind not in (TORCH, OLD_TORCH, SAFETENSORS):
        raise CheckpointError(f"{path} is {kind.what}: {kind.advice}")
    if (kind is SAFETENSORS) != (path.suffix.lower() in SAFETENSORS_ENDINGS):
        right = path.with_suffix(".safetensors" if kind is SAFETENSORS else ".pth").name
        raise CheckpointError(f"{path} is {kind.what} under a wrong name: rename it to {right}")
    return kind


class _Bounded(io.BufferedReader):
    """A file of which no one reads more at once than it holds, whatever length is written in it."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(-1 if size is None else min(size, os.stat(self.fileno()).st_size))


def _load_old(path: Path) -> Any:
    # files older than the zip format cannot be mapped
    with _Bounded(open(path, "rb", buffering=0)) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[Kind, Callable[[Path], Any]] = {
    TORCH: map_pth,
    OLD_TORCH: _load_old,
    SAFETENSORS: map_safetensors,
}


def write_weights(path: str | Path, weights: Mapping[str, Tensor], *, note: str = "") -> None:
    """Writes a `.pth` (or `.safetensors`, by its name) atomically, keeping the order of `weights`.

    Args:
        note: of a `.pth`, see `write_tensors`.
    Raises:
        CheckpointError: it cannot be written; a file of that name stays as it was.
    """
    specs = {name: Spec(tuple(x.shape), x.dtype) for name, x in weights.items()}
    write_tensors(path, specs, weights.__getitem__, note=note)


def infer_model_config(weights: Mapping[str, Tensor], path: str | Path = "the file") -> ModelConfig:
    """The model config of a file's tensors, see `read_model_config`, all of which are as it says.

    Args:
        path: of the file, for messages.
    Raises:
        CheckpointError: names or shapes disagree; all of them are in the one message.
    """
    model_config = read_model_config({name: tuple(x.shape) for name, x in weights.items()})
    require_fit(build(model_config, op="reference"), weights, path)
    return model_config


def load_weights(
    model: RWKV,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    storage: Storage | None = None,
) -> None:
    """Puts weights into a model made by `build`, frozen, in one type on one device.

    With None for the type each keeps its own, and its memory where the device is the same. With
    `storage` the projections are stored by it, one tensor after the other. Layers that await their
    weights are passed over.

    The tensors of a learned state, if the file has one, become the model's initial state.

    Raises:
        CheckpointError: names or shapes disagree; all of them are in the one message.
    """
    states = require_fit(model, weights)
    if states:
        here = {name: x.to(device).float() for name, x in states.items()}
        model.initial_state = model.version.state.to_state(here, model.model_config)
    projections = set()
    if storage:
        projections = {name for name, _ in stored_layers(model, has_head=storage.has_head)}
    for name in dict(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if isinstance(model.get_submodule(owner), AwaitedLinear):
            continue
        if storage and owner in projections:
            model.set_submodule(owner, quantise(weights[name].to(device), storage))
            continue
        value = weights[name].to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def require_fit(
    model: RWKV, weights: Mapping[str, Tensor], path: str | Path = "the file"
) -> dict[str, Tensor]:
    """Raises unless a file's tensors are those of a model; gives those of a learned state in it.

    Args:
        path: of the file, for messages.
    Raises:
        CheckpointError: names or shapes disagree; all of them are in the one message.
    """
    expected = {name: tuple(x.shape) for name, x in model.named_parameters()}
    states = {name: x for name, x in weights.items() if name.endswith(STATE_SUFFIX)}
    if states:
        is_full = len(states) > model.model_config.n_layer
        wanted = model.version.state.shapes(model.model_config, is_full)
        expected |= wanted if wanted.keys() >= states.keys() else {}
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit an RWKV model, {len(problems)} problems: "
            + join_problems(problems)
        )
    return states


def write_like(path: str | Path, base: str | Path, changed: Mapping[str, Tensor]) -> None:
    """Writes the file `base` anew with some tensors changed.

    Order, shapes and dtypes are those of the base; tensors not in `changed` keep their bits. Those
    in it are asked for one at a time.

    Raises:
        CheckpointError: a changed tensor is not in the base or has another shape.
    """
    weights = read_weights(base)
    for name, value in changed.items():
        if name not in weights or weights[name].shape != value.shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise CheckpointError(
                f"{name} {tuple(value.shape)} does not fit {base}, where it is {found}: give the "
                "model that was trained"
            )
    specs = {name: Spec(tuple(x.shape), x.dtype) for name, x in weights.items()}

    def tensor(name: str) -> Tensor:
        return changed[name].to(specs[name].dtype) if name in changed else weights[name]

    write_tensors(path, specs, tensor)
