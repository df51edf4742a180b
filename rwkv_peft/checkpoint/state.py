"""Files of learned initial states, as RWKV programs read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_peft.checkpoint.older import old_method
from rwkv_peft.checkpoint.pth import STATE_SUFFIX, read_weights, write_weights
from rwkv_peft.checkpoint.records import read_record
from rwkv_peft.checkpoint.stream import NOTE, require_finite
from rwkv_peft.errors import CheckpointError
from rwkv_peft.models import version_named
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.quant import Storage


def is_state_file(path: str | Path) -> bool:
    """Whether a path is a file, and not an adapter."""
    return Path(path).is_file() and not old_method(path)


def holds_state_alone(path: str | Path) -> bool:
    """Whether every tensor of a file is one of a state."""
    names = read_weights(path)
    return bool(names) and all(name.endswith(STATE_SUFFIX) for name in names)


def write_state(
    path: str | Path, tensors: Mapping[str, Tensor], storage: Storage | None = None
) -> None:
    """Writes `blocks.{i}.att.time_state` (H, N, N) of every layer, in float32.

    Rows are values and columns keys, for every version: RWKV-6 programs transpose, those of
    RWKV-7 do not. A full state also has the two shift vectors (D,) of each layer.

    Args:
        storage: how the base was stored on which the state was trained.
    """
    note = json.dumps({"quant": storage.note}) if storage else ""
    write_weights(path, {name: x.float() for name, x in tensors.items()}, note=note)


def read_state_note(path: str | Path) -> dict[str, Any]:
    """What is noted in the file of a state: `quant`, how its base was stored if not dense.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        found = json.loads(read_record(path, NOTE) or b"{}")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its {NOTE} is no JSON: copy it again") from error
    return found if isinstance(found, dict) else {}


def read_state(path: str | Path, model_config: ModelConfig) -> dict[str, Tensor]:
    """The float32 tensors of a state file.

    Raises:
        CheckpointError: it is not the state of such a model.
    """
    tensors = {n.removeprefix("model."): x.float() for n, x in read_weights(path).items()}
    states = {n: x for n, x in tensors.items() if n.endswith(STATE_SUFFIX)}
    if not states:
        raise CheckpointError(
            f"{path} holds no learned state and no adapter, its first tensor is "
            f"{next(iter(tensors), 'missing')}: give a file that --peft state wrote"
        )
    found = {n: tuple(x.shape) for n, x in states.items()}
    plain, full = (
        version_named(model_config.version).state.shapes(model_config, is_full)
        for is_full in (False, True)
    )
    if found in (plain, full):
        require_finite(states, path)
        return states
    name = next((n for n in plain if found.get(n) != plain[n]), next(iter(found), "nothing"))
    raise CheckpointError(
        f"{path} is no state of this model ({model_config.describe()}): {name} is "
        f"{found.get(name, 'missing')}, {plain.get(name, 'not expected')} is needed; give a file "
        "that --peft state wrote for it"
    )


def load_state(model: RWKV, path: str | Path) -> None:
    """Makes the state of a file the one in which every text of a model begins.

    Raises:
        CheckpointError: it is not the state of such a model.
    """
    device = model.emb.weight.device
    tensors = {n: x.to(device) for n, x in read_state(path, model.model_config).items()}
    model.initial_state = model.version.state.to_state(tensors, model.model_config)
