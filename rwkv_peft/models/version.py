"""What a version of RWKV is to the rest of the program: one record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from rwkv_peft.models.config import ModelConfig, ShapeLookup, Shapes
from rwkv_peft.models.time_state import StateFormat
from rwkv_peft.ops.dispatch import Backend


class FreshModel(NamedTuple):
    """How pre-training begins.

    Attributes:
        complete: a model config with the sizes that its maker left open.
        weights: all tensors of such a model by official name, float32; called with its config and
            a seed.
    """

    complete: Callable[[ModelConfig], ModelConfig]
    weights: Callable[[ModelConfig, int], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Version:
    """All that sets one version of RWKV apart from the others.

    Attributes:
        name: as in `--my_testing`, for example 'x070'.
        detect: whether a file of tensors of these names and shapes is of this version, if it is of
            none that stands before it in the table.
        read: the fields of the model config that other versions do not have or find elsewhere, and
            `n_head`, from such a file.
        block: makes one layer; called with the model config, the layer's number and the operator's
            kernel.
        operator: name of its recurrence.
        backends: the table of the operator.
        target_modules: what a method adapts by default: every large projection, but not the
            low-rank maps, the embedding or the head.
        unread: names of the tensors of a file that no forward reads.
        parts: what a word of `--train_parts` means, as a regular expression searched for in the
            names of tensors. Any other word is searched for as it is.
        lr_factors: learning-rate factors of official pre-training, by the end of a tensor's name.
        state: its state as tensors of a file.
        fresh: a model without training; None if official pre-training's is not known here.
    """

    name: str
    detect: Callable[[Shapes], bool]
    read: Callable[[ShapeLookup], dict[str, Any]]
    block: Callable[[ModelConfig, int, Callable[..., tuple[Tensor, Tensor]]], nn.Module]
    operator: str
    backends: tuple[Backend, ...]
    target_modules: tuple[str, ...]
    unread: frozenset[str]
    parts: Mapping[str, str]
    lr_factors: Mapping[str, float]
    state: StateFormat
    fresh: FreshModel | None
