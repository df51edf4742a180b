"""The weights of a base as a run with `--quant` computed with them."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.folder import NOTE, SavedAdapter, read_folder
from rwkv_peft.checkpoint.pth import STATE_SUFFIX, infer_model_config
from rwkv_peft.checkpoint.state import is_state_file, read_state_note
from rwkv_peft.device import dtype_of
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods import residual
from rwkv_peft.methods.attach import ADAPTER, PREFIX, attach_config
from rwkv_peft.methods.residual import add_product, split_start
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import STORAGES, Storage, round_trip, stored_layers


def storage_of(note: Mapping[str, Any], path: object) -> Storage | None:
    """How the base was stored that an adapter was trained on, by the adapter's note; None: dense.

    Raises:
        CheckpointError: the note has something else.
    """
    found = note.get("quant")
    if found is None:
        return None
    try:
        name, dtype = found["storage"], getattr(torch, found["dtype"])
    except (TypeError, KeyError, AttributeError):
        name, dtype = None, None
    if name not in STORAGES or dtype not in map(dtype_of, ("fp32", "bf16", "fp16")):
        raise CheckpointError(
            f"{path} notes {str(found)[:80]} as the form of its base, and known are "
            f"{', '.join(STORAGES)}: update this program"
        )
    return Storage(name, dtype, found.get("head") is True)


def noted_storage(path: str | Path) -> Storage | None:
    """How the base was stored on which the adapter or the state of a path was trained."""
    if is_state_file(path):
        return storage_of(read_state_note(path), path)
    if not (Path(path) / NOTE).is_file():
        return None
    return storage_of(read_folder(path).note, path)


class BaseAsTrained(Mapping[str, Tensor]):
    """The tensors of a base's file; those that were stored otherwise are made when asked for.

    Those that an adapter began by taking a part out of (PiSSA) are what was stored of the rest,
    and that part: in float32. The last that was made is kept, as who adds to a tensor reads it
    more than once.

    Args:
        adapter: the one that was trained on it, if one.
    Attributes:
        stored: names of the tensors that were stored otherwise.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        storage: Storage,
        adapter: SavedAdapter | None = None,
    ) -> None:
        own = {n: x for n, x in weights.items() if not n.endswith(STATE_SUFFIX)}
        model = build(infer_model_config(own), op="reference")
        self._weights, self._storage = weights, storage
        layers = stored_layers(model, has_head=storage.has_head)
        self.stored = {f"{name}.weight" for name, _ in layers}
        self._parts = _find_parts(model, adapter) if adapter else {}
        self._made: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.stored:
            return self._weights[name]
        if self._made is None or self._made[0] != name:
            # the one before goes first, so that there are never two
            self._made = None
            self._made = name, self._make(name)
        return self._made[1]

    def _make(self, name: str) -> Tensor:
        if name not in self._parts:
            return round_trip(self._weights[name], self._storage)
        b, a, scale = self._parts[name]
        x = self._weights[name].to(torch.float32, copy=True)
        add_product(x, b, a, -scale)
        x = round_trip(x, self._storage).float()
        add_product(x, b, a, scale)
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _find_parts(model: RWKV, adapter: SavedAdapter) -> dict[str, tuple[Tensor, Tensor, float]]:
    """B0, A0 and their scale by the names of the weights that an adapter took them out of."""
    if not adapter.note.get("init"):
        return {}
    _, start = split_start(adapter.tensors)
    # for the scale of each layer, which is that of its factors joined to their start
    attach_config(model, copy.deepcopy(adapter.config), is_fused=False)
    found = {}
    for name, layer in residual.layers(model):
        b, a = (start[f"{PREFIX}{name}.lora_{x}.weight"] for x in "BA")
        found[f"{name}.weight"] = b, a, layer.scaling[ADAPTER]
    return found
