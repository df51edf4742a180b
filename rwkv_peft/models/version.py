"""What a version of RWKV is to the rest of the program: one record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rwkv_peft.models.config import ModelConfig, Shapes
from rwkv_peft.models.time_state import StateFormat
from rwkv_peft.ops.dispatch import Backend


@dataclass(frozen=True, slots=True)
class Version:
    """All that sets one version of RWKV apart from the others.

    Attributes:
        name: as in `--my_testing`, for example 'x070'.
        detect: whether tensors of these names and shapes are of this version. A file is of the
            first version in the table that says so; later ones need not know of it.
        read: `n_head`, and the fields of the model config that not every version has, from the
            tensors of such a file.
        block: makes one layer; called with the model config, the layer's number and the operator's
            kernel.
        operator: name of its recurrence.
        backends: the table of the operator.
        target_modules: what a method adapts by default: every large projection, but not the
            low-rank maps, the embedding or the head.
        unread: names of the tensors of a file that no forward reads.
        parts: words of `--train_parts` that mean more than the tensors with the word in their
            name, each with the regular expression that finds them.
        lr_factors: learning-rate factors of official pre-training, by the end of a tensor's name.
        state: its state as tensors of a file.
        fresh: the completed config and the float32 weights, by official name, with which official
            pre-training begins, from the sizes and a seed; None if that is not known here.
    """

    name: str
    detect: Callable[[Shapes], bool]
    read: Callable[[Shapes], dict[str, Any]]
    block: Callable[[ModelConfig, int, Callable[..., tuple[Tensor, Tensor]]], nn.Module]
    operator: str
    backends: tuple[Backend, ...]
    target_modules: tuple[str, ...]
    lr_factors: Mapping[str, float]
    state: StateFormat
    unread: frozenset[str] = frozenset()
    parts: Mapping[str, str] = field(default_factory=dict)
    fresh: Callable[[ModelConfig, int], tuple[ModelConfig, dict[str, Tensor]]] | None = None
