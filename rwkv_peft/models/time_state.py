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
    heads = (model_config.n_head, model_config.head_size, model_config.head_size)
    found: dict[str, tuple[int, ...]] = {}
    for i in range(model_config.n_layer):
        found[f"blocks.{i}.att.time_state"] = heads
        if is_full:
            found[f"blocks.{i}.att.ts_state"] = (model_config.n_embd,)
            found[f"blocks.{i}.ffn.ts_state"] = (model_config.n_embd,)
    return found


def _to_state(tensors: Mapping[str, Tensor], model_config: ModelConfig) -> RWKVState:
    stacked = []
    for kind, width in (("att", model_config.n_embd), ("ffn", model_config.n_embd)):
        names = [f"blocks.{i}.{kind}.ts_state" for i in range(model_config.n_layer)]
        zeros = next(iter(tensors.values())).new_zeros(width)
        stacked.append(torch.stack([tensors.get(name, zeros) for name in names]).unsqueeze(1))
    wkv = [tensors[f"blocks.{i}.att.time_state"] for i in range(model_config.n_layer)]
    att, ffn = stacked
    return RWKVState(att, ffn, torch.stack(wkv).unsqueeze(1))


TIME_STATE = StateFormat(_shapes, _to_state)
