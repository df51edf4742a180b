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

    The last that was made is kept, as who adds to a tensor reads it more than once.

    Attributes:
        stored: names of the latter.
    """

    def __init__(self, weights: Mapping[str, Tensor], storage: Storage) -> None:
        own = {n: x for n, x in weights.items() if not n.endswith(STATE_SUFFIX)}
        model = build(infer_model_config(own), op="reference")
        self._weights, self._storage = weights, storage
        self.stored = {f"{name}.weight" for name, _ in stored_layers(model)}
        self._made: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.stored:
            return self._weights[name]
        if self._made is None or self._made[0] != name:
            # the one before goes first, so that there are never two
            self._made = None
            self._made = name, round_trip(self._weights[name], self._storage)
        return self._made[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
