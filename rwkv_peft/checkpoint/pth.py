"""Official weight files: `.pth` and `.safetensors` of tensors under their official names."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_peft.checkpoint.stream import Spec, map_safetensors, write_tensors
from rwkv_peft.errors import CheckpointError
from rwkv_peft.models import read_model_config
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.recognise import OLD_TORCH, SAFETENSORS, TORCH, Kind, recognise

LISTED_PROBLEMS = 12
# end of the names of a learned state's tensors
STATE_SUFFIX = "_state"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file in its own order, mapped from disk rather than read.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds anything but tensors.
    """
    path = Path(path)
    kind = require_weights(path)
    weights = _read_safetensors(path) if kind is SAFETENSORS else _read_pth(path, kind)
    strange = [name for name, x in weights.items() if not isinstance(x, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} holds other things than tensors ({', '.join(map(str, strange[:3]))} …): "
            "give a file of weights alone"
        )
    return weights


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
    if (kind is SAFETENSORS) != (path.suffix.lower() == ".safetensors"):
        right = path.with_suffix(".safetensors" if kind is SAFETENSORS else ".pth").name
        raise CheckpointError(f"{path} is {kind.what} under a wrong name: rename it to {right}")
    return kind


def _read_pth(path: Path, kind: Kind) -> dict[str, Tensor]:
    try:
        # files older than the zip format cannot be mapped
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=kind is TORCH)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: {_explain(error)}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or no .pth file ({first[:120]})") from error
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} holds a {type(weights).__name__}, not a table of tensors")
    return weights


def _explain(error: pickle.UnpicklingError) -> str:
    """Why torch does not unpickle a file, and what to do."""
    if found := re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", str(error), re.IGNORECASE):
        return (
            f"it holds more than tensors, and opening it would run code of {found[1]}. Who trusts "
            "it loads it where it was made, and saves model.state_dict() by torch.save"
        )
    return "its table of tensors is damaged; download or copy it again"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        # the library checks the header; its tensors are copies, and these are views of the file
        with safe_open(path, framework="pt"):
            return map_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no .safetensors file ({error})") from error


def write_weights(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a `.pth` (or `.safetensors`, by its name) atomically, keeping the order of `weights`.

    Raises:
        CheckpointError: it cannot be written; a file of that name stays as it was.
    """
    specs = {name: Spec(tuple(x.shape), x.dtype) for name, x in weights.items()}
    write_tensors(path, specs, weights.__getitem__)


def infer_model_config(weights: Mapping[str, Tensor]) -> ModelConfig:
    """The model config of a file's tensors; see `read_model_config`."""
    return read_model_config({name: tuple(x.shape) for name, x in weights.items()})


def load_weights(
    model: RWKV,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Puts weights into a model made by `build`, frozen, in one type on one device.

    With None for the type each keeps its own, and its memory where the device is the same.

    The tensors of a learned state, if the file has one, become the model's initial state.

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
        more = f" and {len(problems) - LISTED_PROBLEMS} more" * (len(problems) > LISTED_PROBLEMS)
        raise CheckpointError(
            f"the file does not fit an RWKV model, {len(problems)} problems: "
            + "; ".join(problems[:LISTED_PROBLEMS])
            + more
        )
    if states:
        here = {name: x.to(device).float() for name, x in states.items()}
        model.initial_state = model.version.state.to_state(here, model.model_config)
    for name in expected.keys() - states.keys():
        owner, _, leaf = name.rpartition(".")
        value = weights[name].to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


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
