"""Adapters in the format of Hugging Face peft: written, read, attached."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkv_peft.checkpoint.folder import SavedAdapter, read_folder, write_folder
from rwkv_peft.checkpoint.mapped import build_mapped
from rwkv_peft.checkpoint.older import LegacyAdapterHints, add_start, old_method, read_old_adapter
from rwkv_peft.checkpoint.pth import STATE_SUFFIX
from rwkv_peft.checkpoint.state import is_state_file
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods import factors, fast, residual
from rwkv_peft.methods.attach import (
    ADAPTER,
    PREFIX,
    Attachment,
    adapter_tensors,
    attach_config,
    load_values,
    named_parts,
    with_parts,
)
from rwkv_peft.methods.miss import lay_along_inputs
from rwkv_peft.methods.sketch import Whole, sketch_layers
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import Storage, find_storage


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
    write_folder(folder, to_saved(attachment, values, base_fingerprint), base)


def to_saved(
    attachment: Attachment,
    values: Mapping[str, Tensor],
    base_fingerprint: str = "",
    whole: Whole = nullcontext,
) -> SavedAdapter:
    """What belongs into the folder of an adapter, its values under the names of `attachment`."""
    assert attachment.peft_model is not None
    config = attachment.peft_model.peft_config[ADAPTER]
    note: dict[str, Any] = {"base": base_fingerprint}
    note["trained"] = sketch_layers(attachment, values, whole)
    if storage := find_storage(attachment.peft_model):
        note["quant"] = storage.note
    if attachment.start:
        values = residual.join_start(values, attachment.start)
        config = residual.with_rank(config, 2)
        note["init"] = attachment.init
    names = {id(parameter): name for name, parameter in attachment.items()}
    tensors = {
        # computed on the model's device, where no more than one of them need be
        key: values[names[id(x)]].cpu() if id(x) in names else x
        for key, x in adapter_tensors(attachment).items()
    }
    return SavedAdapter(config, tensors, note)


def read_adapter(
    path: str | Path,
    hints: LegacyAdapterHints | None = None,
    *,
    base_fingerprint: str = "",
    force: bool = False,
) -> SavedAdapter:
    """An adapter from a folder in peft's format or a file of older RWKV-PEFT.

    Args:
        hints: what a file of older RWKV-PEFT does not hold. For the folder of an adapter on a
            residual base `pissa_init` makes it one on the original base; nothing else may be given
            for a folder.
        base_fingerprint: of the base it is wanted for; not compared with the adapter's if empty.
        force: accept an adapter of another base.
    Raises:
        CheckpointError: a file is missing, damaged or not an adapter, or lacks what must be given;
            the adapter belongs to another base.
    """
    hints = hints or LegacyAdapterHints()
    if old_method(path):
        return read_old_adapter(path, hints)
    if Path(path).is_file():
        raise CheckpointError(
            f"{path} holds no adapter: give a folder in peft's format or a file of lora_A and "
            "lora_B, of disha or of bone; a learned state is trained by --peft state"
        )
    adapter = read_folder(path)
    for name in ("lora_alpha", "lora_dropout"):
        if getattr(hints, name) is not None:
            raise CheckpointError(f"{path} brings its own {name}: leave it out")
    if hints.pissa_init:
        # the adapter is then one on the original base, which its note does not name
        adapter = add_start(path, adapter, hints.pissa_init)
    wanted = adapter.note.get("base")
    if wanted and base_fingerprint and wanted != base_fingerprint and not force:
        name = Path(adapter.config.base_model_name_or_path or "unnamed").name
        raise CheckpointError(
            f"{path} was trained on another base ({wanted}, {name}) than this one "
            f"({base_fingerprint}): give that base, or --force true to insist"
        )
    return adapter


def saved_method(path: str | Path) -> str:
    """The method of a saved adapter or state, by its name for --peft.

    Raises:
        CheckpointError: it is neither.
    """
    if is_state_file(path):
        return "state"
    return old_method(path) or str(read_folder(path).config.peft_type.value).lower()


def load_adapter(model: RWKV, adapter: SavedAdapter, folder: str | Path) -> None:
    """Attaches an adapter to a model, frozen.

    Args:
        folder: where it was read, for messages.
    Raises:
        CheckpointError: its tensors are not exactly those that its config makes in this model.
    """
    load_values(attach_adapter(model, adapter, folder), adapter.tensors)
    fast.fuse(model)
    model.requires_grad_(False)


def attach_to_base(
    weights: Mapping[str, Tensor],
    adapter: SavedAdapter,
    folder: str | Path,
    storage: Storage | None = None,
) -> tuple[RWKV, Attachment]:
    """A model made of a base's mapped tensors, and an adapter attached to it in float32.

    Learned states among `weights` are left out.

    Args:
        storage: in which the model has its projections; None: as they are in the file.

    Raises:
        CheckpointError: the adapter's tensors are not exactly those that its config makes in this
            model.
    """
    own = {n: x for n, x in weights.items() if not n.endswith(STATE_SUFFIX)}
    if factors.reads_base(adapter.config):
        # as a model computes it from the whole file; most methods leave the base on disk
        own = {n: x.float() for n, x in own.items()}
    start: dict[str, Tensor] = {}
    if storage:
        # what was stored is the residual
        adapter, start = _split_start(adapter)
    model = build_mapped(own, storage)
    official = list(model.parameters())
    attachment = attach_adapter(model, adapter, folder)
    trained = {id(attachment[name]) for name in attachment.plain}
    kept = {id(x) for x in official} - trained
    for x in (*model.parameters(), *model.buffers()):
        if id(x) not in kept and x.is_floating_point():
            # as fine as in the file, whatever the dtype of the base
            x.data = x.data.float()
    load_values(attachment, adapter.tensors)
    if start:
        residual.take_out(model, _match_parameters(attachment, start), own)
    return model, attachment


def _split_start(adapter: SavedAdapter) -> tuple[SavedAdapter, dict[str, Tensor]]:
    """An adapter as it was trained, and the values it began with; none if its base is whole."""
    if not adapter.note.get("init"):
        return adapter, {}
    values, start = residual.split_start(adapter.tensors)
    return SavedAdapter(residual.with_rank(adapter.config, 0.5), values, adapter.note), start


def attach_saved(
    model: RWKV,
    folder: str | Path,
    *,
    hints: LegacyAdapterHints | None = None,
    train_parts: Sequence[str] = (),
    base_fingerprint: str = "",
    force: bool = False,
    is_fused: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[Attachment, dict[str, Tensor]]:
    """Attaches an adapter that is to be trained further.

    Args:
        folder, hints, base_fingerprint, force: as of `load_adapter`.
        train_parts: what else to train, beside what is in its file; see `methods.attach`.
        is_fused, weights: as of `methods.attach`.
    Returns:
        the tensors to train, and the file's values for them, both by name: the model's dtype may
        be coarser than the file's float32.
    Raises:
        CheckpointError: as `load_adapter`.
    """
    adapter = read_adapter(folder, hints, base_fingerprint=base_fingerprint, force=force)
    adapter, start = _split_start(adapter)
    parts = named_parts(model, train_parts)
    attachment = attach_adapter(model, adapter, folder)
    load_values(attachment, adapter.tensors)
    with_parts(model, attachment, {n: attachment[n] for n in attachment.plain} | parts)
    found = _match_parameters(attachment, adapter.tensors)
    if start:
        attachment.start = _match_parameters(attachment, start)
        attachment.init = adapter.note["init"]
        residual.take_out(model, attachment.start, weights)
    if is_fused:
        fast.fuse(model)
    return attachment, found


def _match_parameters(attachment: Attachment, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, by the names of the trained parameters that they belong to."""
    # peft's names in files are not those of the parameters; the tensors tell which is which
    names = {id(parameter): name for name, parameter in attachment.items()}
    own = adapter_tensors(attachment)
    return {names[id(x)]: tensors[k] for k, x in own.items() if id(x) in names and k in tensors}


def attach_adapter(model: nn.Module, adapter: SavedAdapter, folder: str | Path) -> Attachment:
    """Attaches an adapter to a plain model, without its values, and checks that they will fit.

    Raises:
        CheckpointError: they are not exactly those that its config makes in this model.
    """
    official = dict(model.named_parameters())
    try:
        attachment = attach_config(model, adapter.config, is_fused=False)
    except ConfigError as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    if any(n.endswith("miss_block") and x.ndim == 4 for n, x in adapter.tensors.items()):
        lay_along_inputs(model)
    # in the order of the model, not of the file, so that every sum over them is the same; modules
    # that peft's `modules_to_save` replaces have such names in files too
    kept = dict(model.named_parameters())
    plain = {n: p for n, p in official.items() if PREFIX + n in adapter.tensors and n in kept}
    assert attachment.peft_model is not None
    factors.fit(attachment.peft_model, adapter.tensors)
    with_parts(model, attachment, plain)
    expected = {n: tuple(x.shape) for n, x in adapter_tensors(attachment).items()}
    found = {n: tuple(x.shape) for n, x in adapter.tensors.items()}
    made = expected.keys() & set(attachment.factors)
    if made.isdisjoint(found) and (made or factors.leaves_out(adapter.config)):
        warnings.warn(
            f"{folder} lacks the factors that its method makes of the base weights: they are made "
            "again, and where the number of threads or the machine is another than in training, "
            "the adapter may change the model otherwise than it did there",
            stacklevel=2,
        )
        expected = {n: shape for n, shape in expected.items() if n not in made}
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
