"""The weights of a base as a run with `--quant` computed with them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.pth import STATE_SUFFIX, infer_model_config
from rwkv_peft.device import dtype_of
from rwkv_peft.errors import CheckpointError
from rwkv_peft.models import build
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
    return Storage(name, dtype)


class BaseAsTrained(Mapping[str, Tensor]):
    """The tensors of a base's file; those that were stored otherwise are made when asked for.

    Attributes:
        stored: names of the latter.
    """

    def __init__(self, weights: Mapping[str, Tensor], storage: Storage) -> None:
        own = {n: x for n, x in weights.items() if not n.endswith(STATE_SUFFIX)}
        model = build(infer_model_config(own), op="reference")
        self._weights, self._storage = weights, storage
        self.stored = {f"{name}.weight" for name, _ in stored_layers(model)}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        return round_trip(weight, self._storage) if name in self.stored else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
