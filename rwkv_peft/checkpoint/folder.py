"""Folders of adapters in the format of Hugging Face peft."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.checkpoint.stream import is_finite, require_finite
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.catalog import check_saved, is_start
from rwkv_peft.methods.options import one_line
from rwkv_peft.methods.sketch import AsTrained
from rwkv_peft.recognise import (
    ANNEX,
    CUT_SAFETENSORS,
    EMPTY,
    HTML,
    JSON,
    LFS,
    SAFETENSORS,
    recognise,
)
from rwkv_peft.writing import atomic_folder, restore_folder

if TYPE_CHECKING:
    from peft import PeftConfig

# kinds of files whose own advice says how to get what they stand for
_FETCHED_AGAIN = (ANNEX, CUT_SAFETENSORS, EMPTY, HTML, LFS)
CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "rwkv_peft.json"
FILES = (CONFIG, WEIGHTS, NOTE)
# bytes of a config or a note; a large model's have some hundred thousand
LARGEST_TEXT = 16 << 20
# of values, and of the rows and indices that some methods keep
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_DTYPES |= {torch.int64, torch.int32, torch.uint8, torch.bool}


class SavedAdapter(NamedTuple):
    """An adapter folder.

    Attributes:
        config: the method's config in peft.
        tensors: by the names of peft's files.
        note: what this program adds: `base`, the fingerprint of the base model; `quant`, how it
            was stored if it was not dense, and the dtype of products; `init`, if the first half
            of the factors is what was trained and the other what it began with; and
            `trained`, what its layers computed when it was saved, see `methods.sketch`.
    """

    config: "PeftConfig"
    tensors: dict[str, Tensor]
    note: dict[str, Any]


def write_folder(folder: str | Path, adapter: SavedAdapter, base: str | Path) -> None:
    """Writes an adapter folder from its three parts, whole or not at all."""
    for name, x in adapter.tensors.items():
        if not is_finite(x):
            raise CheckpointError(f"{name} holds NaN or infinity: {folder} was not written")
    files = to_files(adapter, base)
    with atomic_folder(folder) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)


def to_files(adapter: SavedAdapter, base: str | Path) -> dict[str, bytes]:
    """The files of an adapter's folder, by name."""
    from safetensors.torch import save

    config = {**adapter.config.to_dict(), "base_model_name_or_path": str(base)}
    config["inference_mode"] = True
    # clones, as the format refuses tensors that share memory
    tensors = {n: x.detach().cpu().clone().contiguous() for n, x in adapter.tensors.items()}
    # a person reads the one; the other is mostly numbers
    texts = {
        CONFIG: json.dumps(config, indent=2, default=_to_json),
        NOTE: json.dumps(adapter.note),
    }
    return {WEIGHTS: save(tensors), **{name: text.encode() for name, text in texts.items()}}


def to_config(text: str | bytes) -> "PeftConfig":
    """The config of an adapter from its JSON, to train the adapter with.

    Raises:
        ConfigError: the method cannot serve RWKV, or a value is of another type than it declares.
        ValueError, TypeError: it is no JSON object, or peft refuses it.
    """
    from peft import PeftConfig

    values = json.loads(text)
    check_saved(values)
    # how to compute, which belongs to a run and not to an adapter
    values.pop("runtime_config", None)
    config = PeftConfig.from_peft_type(**{**values, "peft_type": str(values["peft_type"]).upper()})
    # files say true, which would make peft freeze the adapter
    config.inference_mode = False
    return config


def _to_json(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_folder(folder: str | Path) -> SavedAdapter:
    """The three parts of an adapter folder.

    Raises:
        CheckpointError: a file is missing or damaged, or peft does not know the method.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    restore_folder(folder)
    if not folder.exists():
        raise CheckpointError(f"there is no adapter {folder}: give a folder or a file that exists")
    for name, wanted in ((CONFIG, JSON), (WEIGHTS, SAFETENSORS)):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no adapter: it has no {name}")
        if (kind := recognise(folder / name)) is not wanted:
            advice = kind.advice if kind in _FETCHED_AGAIN else "copy the adapter's folder again"
            raise CheckpointError(f"{folder / name} is {kind.what}: {advice}")
    try:
        for path in (folder / CONFIG, folder / NOTE):
            if path.is_file() and path.stat().st_size > LARGEST_TEXT:
                raise ConfigError(f"{path.name} has more than {LARGEST_TEXT >> 20} MiB")
        text = (folder / CONFIG).read_bytes()
        json.loads(text)
        with one_line("its config"):
            config = to_config(text)
        tensors = load_file(folder / WEIGHTS)
        path = folder / NOTE
        note = read_note(path.read_bytes()) if path.is_file() else {}
    except ConfigError as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from error
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:600]
        raise CheckpointError(f"{folder} is damaged ({said}): copy it again") from error
    _require_values(tensors, folder)
    require_finite(tensors, folder / WEIGHTS)
    return SavedAdapter(config, tensors, note)


def read_note(text: str | bytes) -> dict[str, Any]:
    """What this program notes beside an adapter, from its JSON.

    Raises:
        ValueError: it is something else.
    """
    try:
        note: dict[str, Any] = json.loads(text)
        is_note = isinstance(note, dict) and isinstance(note.get("base", ""), str)
        if not is_note or (note.get("init", "") not in ("", None) and not is_start(note["init"])):
            raise ValueError("it is no object with base, init and trained")
        AsTrained(note.get("trained", {}))
    except (
        AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError
    ) as error:  # fmt: skip
        said = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"{NOTE}: {said}") from error
    return note


def _require_values(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises CheckpointError if a tensor has a type that no adapter has."""
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} is {str(x.dtype).removeprefix('torch.')}, and "
                "adapters hold float32, float16 or bfloat16: save it again as one of them"
            )
