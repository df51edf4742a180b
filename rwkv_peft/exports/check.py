"""An export is opened again, and its answers compared with those of the model it was made from."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_peft.checkpoint.compare import compare_models, draw_sample
from rwkv_peft.checkpoint.mapped import build_mapped, upcast_on_use
from rwkv_peft.errors import CheckpointError
from rwkv_peft.exports.stored import Stored
from rwkv_peft.models.base import RWKV

# tokens that are compared
COMPARED = 64


class _Later(NamedTuple):
    """Tensors that are made while they are used."""

    stored: Mapping[str, Stored]

    @property
    def names(self) -> set[str]:
        return set(self.stored)

    def pieces(self, name: str) -> Iterator[Tensor]:
        return self.stored[name].floats()


def build_stored(stored: Mapping[str, Stored]) -> RWKV:
    """A model that computes in float32 from tensors where they lie, a few rows at a time."""
    # what is made later has a shape and no memory
    held = {
        name: x.tensor if x.tensor is not None else torch.zeros(()).expand(x.shape)
        for name, x in stored.items()
    }
    later = {name: x for name, x in stored.items() if x.tensor is None}
    return upcast_on_use(build_mapped(held), _Later(later))


def compare(model: RWKV, exported: Mapping[str, Stored], expected: float, what: str) -> str:
    """Compares an exported file, as it was read back, with the model; gives a line on it.

    Args:
        expected: the divergence, nats a token, that the type of the numbers may cost.
        what: the type, for the line.
    Raises:
        CheckpointError: the answers are farther apart.
    """
    text = draw_sample(model.model_config.vocab_size, COMPARED)
    found = compare_models(model, build_stored(exported), text)
    line = f"read back: {found.describe()}; expected of {what}: KL up to {expected:g}"
    if not found.kl <= expected:
        raise CheckpointError(f"the exported file does not answer as the model does: {line}")
    return line
