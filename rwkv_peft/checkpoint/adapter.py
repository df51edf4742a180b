"""Adapters in the format of Hugging Face peft: written, read, attached."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rwkv_peft.checkpoint.files import atomic_write
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods import fast, residual
from rwkv_peft.methods.attach import (
    ADAPTER,
    PREFIX,
    Attachment,
    adapter_tensors,
    attach_config,
    load_values,
    with_parts,
)
from rwkv_peft.models.base import RWKV

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "rwkv_peft.json"


class SavedAdapter(NamedTuple):
    """An adapter folder.

    Attributes:
        config: the method's config in peft.
        tensors: by the names of peft's files.
        note: what this program adds: `base`, the fingerprint of the base model, and `init`, if
            the first half of the factors is what was trained and the other what it began with.
    """

    config: "PeftConfig"
    tensors: dict[str, Tensor]
    note: dict[str, Any]


def write_adapter(
    folder: str | Path,
    attachment: Attachment,
    values: Mapping[str, Tensor],
    *,
    base: str | Path,
    base_fingerprint: str = "",
) -> None:
    """Writes an adapter; nobody ever finds a mixture of an old folder and a new one.

    Args:
        values: the trained tensors under the names of `attachment`.
        base: the file the adapter was trained on, noted in the config.
    """
    assert attachment.peft_model is not None
    config = attachment.peft_model.peft_config[ADAPTER]
    note = {"base": base_fingerprint}
    if attachment.start:
        values = residual.joined(values, attachment.start)
        config = residual.with_rank(config, 2)
        note["init"] = attachment.init
    names = {id(parameter): name for name, parameter in attachment.items()}
    tensors = {
        key: values[names[id(x)]] if id(x) in names else x
        for key, x in adapter_tensors(attachment).items()
    }
    write_folder(folder, SavedAdapter(config, tensors, note), base)


def write_folder(folder: str | Path, adapter: SavedAdapter, base: str | Path) -> None:
    """Writes an adapter folder from its three parts, whole or not at all."""
    from safetensors.torch import save

    folder = Path(folder)
    config = {**adapter.config.to_dict(), "base_model_name_or_path": str(base)}
    config["inference_mode"] = True
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with atomic_write(new / WEIGHTS) as file:
            # clones, as the format refuses tensors that share memory
            tensors = {n: x.detach().cpu().clone() for n, x in adapter.tensors.items()}
            file.write(save({n: x.contiguous() for n, x in tensors.items()}))
        for name, content in ((CONFIG, config), (NOTE, adapter.note)):
            with atomic_write(new / name, "w") as file:
                json.dump(content, file, indent=2, default=_plain)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_adapter(folder: str | Path) -> SavedAdapter:
    """The three parts of an adapter folder.

    Raises:
        CheckpointError: a file is missing or damaged, or peft does not know the method.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no adapter: it has no {name}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
        path = folder / NOTE
        note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, KeyError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error
    # saved as true, it would have peft freeze what is to be trained
    config.inference_mode = False
    return SavedAdapter(config, tensors, note)


def load_adapter(
    model: RWKV, folder: str | Path, *, base_fingerprint: str = "", force: bool = False
) -> None:
    """Attaches an adapter folder to a model, frozen.

    Args:
        base_fingerprint: of the model's file; not compared with the adapter's if empty.
        force: attach it to another base too.
    Raises:
        CheckpointError: the adapter belongs to another base, or its tensors are not exactly those
            that its config makes in this model.
    """
    adapter = read_adapter(folder)
    require_base(folder, adapter, base_fingerprint, force=force)
    attach_values(model, adapter, folder)
    fast.fuse(model)
    model.requires_grad_(False)


def attach_values(
    model: RWKV, adapter: SavedAdapter, folder: str | Path, *, keeps_float32: bool = False
) -> Attachment:
    """Attaches an adapter as it is in its file and puts its values in.

    Args:
        keeps_float32: the adapter's tensors stay as fine as in the file, whatever the model's type.
    Raises:
        CheckpointError: its tensors are not exactly those that the config makes in this model.
    """
    official = list(model.parameters())
    attachment = _attach(model, adapter, folder)
    if keeps_float32:
        trained = {id(attachment[name]) for name in attachment.plain}
        kept = {id(x) for x in official} - trained
        for x in (*model.parameters(), *model.buffers()):
            if id(x) not in kept and x.is_floating_point():
                x.data = x.data.float()
    load_values(attachment, adapter.tensors)
    return attachment


def attach_saved(
    model: RWKV,
    folder: str | Path,
    *,
    base_fingerprint: str = "",
    force: bool = False,
    is_fused: bool = True,
) -> tuple[Attachment, dict[str, Tensor]]:
    """Attaches an adapter folder to a model for training it further.

    Returns:
        the tensors to train and the values they had, both by name, as the file's float32 may be
        finer than the model's type.
    Raises:
        CheckpointError: as `load_adapter`.
    """
    adapter = read_adapter(folder)
    require_base(folder, adapter, base_fingerprint, force=force)
    start: dict[str, Tensor] = {}
    if init := adapter.note.get("init"):
        values, start = residual.split(adapter.tensors)
        adapter = SavedAdapter(residual.with_rank(adapter.config, 0.5), values, adapter.note)
    attachment = _attach(model, adapter, folder)
    load_values(attachment, adapter.tensors)
    found = by_parameter(attachment, adapter.tensors)
    if init:
        attachment.start, attachment.init = by_parameter(attachment, start), init
        residual.take_out(model, attachment.start)
    if is_fused:
        fast.fuse(model)
    return attachment, found


def by_parameter(attachment: Attachment, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, by the names of the trained parameters that they belong to."""
    # peft's names in files are not those of the parameters; the tensors tell which is which
    names = {id(parameter): name for name, parameter in attachment.items()}
    own = adapter_tensors(attachment)
    return {names[id(x)]: tensors[k] for k, x in own.items() if id(x) in names and k in tensors}


def _attach(model: RWKV, adapter: SavedAdapter, folder: str | Path) -> Attachment:
    official = dict(model.named_parameters())
    attachment = attach_config(model, adapter.config, is_fused=False)
    plain = [k.removeprefix(PREFIX) for k in adapter.tensors if k.removeprefix(PREFIX) in official]
    with_parts(model, attachment, {n: official[n] for n in plain})
    expected = {n: tuple(x.shape) for n, x in adapter_tensors(attachment).items()}
    found = {n: tuple(x.shape) for n, x in adapter.tensors.items()}
    if expected != found:
        differ = sorted(
            n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)
        )
        name = differ[0]
        raise CheckpointError(
            f"{folder} does not fit this model, {len(differ)} tensors differ, first "
            f"{name.removeprefix(PREFIX)}: {found.get(name, 'missing')} in the file, "
            f"{expected.get(name, 'not wanted')} in the model: give the base that the adapter was "
            "trained on"
        )
    return attachment


def require_base(
    folder: str | Path, adapter: SavedAdapter, base_fingerprint: str, *, force: bool
) -> None:
    """Compares an adapter's base with the one given; an empty fingerprint agrees with all.

    Raises:
        CheckpointError: they differ, and `force` does not insist.
    """
    wanted = adapter.note.get("base")
    if wanted and base_fingerprint and wanted != base_fingerprint and not force:
        raise CheckpointError(
            f"{folder} was trained on another base ({wanted}, {_name_of(adapter)}) than this one "
            f"({base_fingerprint}): give that base, or --force true to insist"
        )


def _name_of(adapter: SavedAdapter) -> str:
    return Path(adapter.config.base_model_name_or_path or "unnamed").name
