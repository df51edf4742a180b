"""What is to be exported: a model's file, with an adapter or without, as official tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import attach_to_base, read_adapter
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.mapped import upcast_on_use
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import STATE_SUFFIX, infer_model_config, read_weights
from rwkv_peft.checkpoint.stored import BaseAsTrained, storage_of
from rwkv_peft.exports.check import build_stored
from rwkv_peft.exports.stored import Stored, all_mapped
from rwkv_peft.methods.merge import Addition, MergedWeights, split_rows
from rwkv_peft.methods.sketch import AsTrained
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Source:
    """A model to export.

    Attributes:
        tensors: official ones; those that an adapter changes are merged, in float32, when they are
            asked for.
        dtypes: of the tensors in the model's file.
        states: those of a learned state that the file holds.
        addition: the adapted model, if an adapter is merged.
    """

    model_config: ModelConfig
    tensors: Mapping[str, Stored]
    dtypes: Mapping[str, torch.dtype]
    states: Mapping[str, Tensor]
    addition: Addition | None = None

    def model(self) -> RWKV:
        """The model that the export must answer like, computing in float32."""
        if self.addition is None:
            return build_stored(self.tensors)
        return upcast_on_use(self.addition.model)


def open_source(
    path: str | Path, base_model: str | Path, hints: LegacyAdapterHints, force: bool
) -> Source:
    """The model of a file of weights; with a base, that of the base and an adapter.

    Raises:
        CheckpointError: a file cannot be read, or the two do not belong together.
    """
    base = read_weights(base_model or path)
    model_config = infer_model_config(base, base_model or path)
    states = {n: x for n, x in base.items() if n.endswith(STATE_SUFFIX)}
    tensors = all_mapped({n: x for n, x in base.items() if n not in states})
    dtypes = {n: x.dtype for n, x in tensors.items()}
    if not base_model:
        return Source(model_config, tensors, dtypes, states)
    adapter = read_adapter(path, hints, base_fingerprint=fingerprint(base), force=force)
    # on another base than that of training nothing is as it was trained
    check = AsTrained({} if force else adapter.note.get("trained", {}))
    storage = storage_of(adapter.note, path)
    values: Mapping[str, Tensor] = base
    if storage:
        # the base as it was trained
        values = trained = BaseAsTrained(base, storage, adapter)
        for name in trained.stored:
            make = partial(_rows, values, name)
            tensors[name] = Stored(tensors[name].shape, torch.float32, make)
    addition = Addition(*attach_to_base(base, adapter, path, storage), 1.0, check.check)
    merged = MergedWeights(values, [addition])
    for name in sorted(merged.names & tensors.keys()):
        tensors[name] = Stored(tensors[name].shape, torch.float32, partial(merged.pieces, name))
    return Source(model_config, tensors, dtypes, states, addition)


def _rows(values: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    return (x.float() for x in split_rows(values[name]))
