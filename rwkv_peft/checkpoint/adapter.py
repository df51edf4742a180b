"""Adapters in the format of Hugging Face peft, and merging them into official files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_peft.checkpoint.files import atomic_write
from rwkv_peft.checkpoint.pth import geometry_of, read_weights, write_like
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods.attach import attach_config
from rwkv_peft.methods.merge import merged_weights
from rwkv_peft.models.base import RWKV

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: str | Path, model: RWKV, values: Mapping[str, Tensor], base: str) -> None:
    """Writes the adapter of a model; nobody ever finds a mixture of an old folder and a new one.

    Args:
        values: the trained tensors under the names of `model.named_parameters()`.
        base: the file the adapter was trained on, noted in the config.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    state = model.state_dict()
    state.update(values)
    tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    configs: Any = model.peft_config
    config = configs["default"].to_dict()
    config.update(base_model_name_or_path=str(base), inference_mode=True)

    from safetensors.torch import save

    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with atomic_write(new / WEIGHTS) as file:
            file.write(save({PREFIX + n: x.cpu().contiguous() for n, x in tensors.items()}))
        with atomic_write(new / CONFIG, "w") as file:
            json.dump(config, file, indent=2, default=_plain)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_adapter(folder: str | Path) -> "tuple[LoraConfig, dict[str, Tensor]]":
    """Config and tensors of an adapter folder, the tensors without the usual prefix.

    Raises:
        CheckpointError: a file is missing or damaged, or the method is not supported.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no adapter: it has no {name}")
    try:
        method = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
        if method != "LORA":
            raise CheckpointError(f"{folder} holds a {method} adapter; only LORA can be used")
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error
    return config, {name.removeprefix(PREFIX): x for name, x in tensors.items()}


def load_adapter(model: RWKV, folder: str | Path) -> None:
    """Attaches an adapter folder to a model, frozen.

    Raises:
        CheckpointError: its tensors are not exactly those that the config makes in this model.
    """
    trained, values = attach_saved(model, folder)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[name])
    model.requires_grad_(False)


def attach_saved(
    model: RWKV, folder: str | Path
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Attaches an adapter folder to a model for training it further.

    Returns:
        the tensors to train and the values they had, both by name; the values are still to be
        put in, as their float32 may be finer than the model's type.
    Raises:
        CheckpointError: its tensors are not exactly those that the config makes in this model.
    """
    from peft import get_peft_model_state_dict

    config, tensors = read_adapter(folder)
    # saved as true, it would have peft freeze what is to be trained
    config.inference_mode = False
    trained = attach_config(model, config)
    # saving embeddings is off, since peft would look for a config of the base on a hub
    parameters = dict(model.named_parameters())
    own = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    expected = {n: tuple(x.shape) for n, x in own.items()}
    found = {n: tuple(x.shape) for n, x in tensors.items()}
    if expected != found:
        differ = sorted(
            n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)
        )
        name = differ[0]
        raise CheckpointError(
            f"{folder} does not fit this model, {len(differ)} tensors differ, first {name}: "
            f"{found.get(name, 'missing')} in the file, {expected.get(name, 'not wanted')} in "
            "the model: give the base that the adapter was trained on"
        )
    # peft's names in files are not those of the parameters; the tensors tell which is which
    names = {id(parameter): name for name, parameter in parameters.items()}
    return trained, {names[id(parameter)]: tensors[key] for key, parameter in own.items()}


def merge(base_model: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Writes `output`: the official file `base_model` with an adapter added into it.

    The sums are float32 and rounded once to the type of the base's tensor; everything else in the
    file keeps its order and its bits.

    Raises:
        CheckpointError: a file cannot be read or written, or the adapter does not fit the base.
    """
    weights = read_weights(base_model)
    config, tensors = read_adapter(adapter)
    changed, is_trained = {}, False
    for name, value in merged_weights(weights, geometry_of(weights), config, tensors):
        is_trained = is_trained or not torch.equal(value, weights[name].float())
        changed[name] = value.to(weights[name].dtype)
    if not is_trained:
        raise CheckpointError(f"{adapter} changes nothing in {base_model}: it was never trained")
    write_like(output, base_model, changed)
