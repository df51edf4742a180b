"""The state that RWKV-5, 6 and 7 share, as tensors of a file."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_peft.models.config import ModelConfig
from rwkv_peft.state import RWKVState


class StateFormat(NamedTuple):
    """How a version's state is kept in a file.

    Attributes:
        shapes: names and shapes of the tensors of one row's state; called with a model config, and
            whether the state is a full one.
        to_state: the state of one row from these tensors, differentiable in them.
    """

    shapes: Callable[[ModelConfig, bool], dict[str, tuple[int, ...]]]
    to_state: Callable[[Mapping[str, Tensor], ModelConfig], RWKVState]


def _shapes(model_config: ModelConfig, is_full: bool) -> dict[str, tuple[int, ...]]:
    """`blocks.{i}.att.time_state` (H, N, N), rows = value, columns = key.

    A full state also has `att.ts_state` and `ffn.ts_state` (D,), which take the place of the token
    before the first.
    """
    H, N, D = model_config.n_head, model_config.head_size, model_config.n_embd
    own: dict[str, tuple[int, ...]] = {"att.time_state": (H, N, N)}
    if is_full:
        own |= {"att.ts_state": (D,), "ffn.ts_state": (D,)}
    layers = range(model_config.n_layer)
    return {f"blocks.{i}.{name}": shape for i in layers for name, shape in own.items()}


def _to_state(tensors: Mapping[str, Tensor], model_config: ModelConfig) -> RWKVState:
    zeros = next(iter(tensors.values())).new_zeros(model_config.n_embd)
    blocks = [f"blocks.{i}" for i in range(model_config.n_layer)]
    att = [tensors.get(f"{block}.att.ts_state", zeros) for block in blocks]
    ffn = [tensors.get(f"{block}.ffn.ts_state", zeros) for block in blocks]
    wkv = [tensors[f"{block}.att.time_state"] for block in blocks]
    return RWKVState(*(torch.stack(layers).unsqueeze(1) for layers in (att, ffn, wkv)))


TIME_STATE = StateFormat(_shapes, _to_state)
