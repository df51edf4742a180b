"""Models: which versions there are, and how one is built from a model_config."""

from collections.abc import Callable

import torch
from torch import nn

from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.rwkv5 import Block as Block5
from rwkv_peft.models.rwkv6 import Block as Block6
from rwkv_peft.models.rwkv7 import Block as Block7
from rwkv_peft.ops.dispatch import Backend, Request, select
from rwkv_peft.ops.wkv6 import TABLE as WKV6
from rwkv_peft.ops.wkv7 import TABLE as WKV7

# version -> its block, its operator's name and table
MODELS: dict[str, tuple[Callable[..., nn.Module], str, tuple[Backend, ...]]] = {
    "x070": (Block7, "wkv7", WKV7),
    "x060": (Block6, "wkv6", WKV6),
    "x052": (Block5, "wkv6", WKV6),
    "x051": (Block5, "wkv6", WKV6),
    "x050": (Block5, "wkv6", WKV6),
}


def build(
    model_config: ModelConfig,
    *,
    op: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RWKV:
    """A model without weights (on the meta device), with its operator's backend chosen.

    Args:
        op: 'auto' or a backend's name; `device` and `dtype` are what it must serve.
    Raises:
        BackendUnavailableError: no backend, or not the one asked for, can serve.
    """
    block, operator, table = MODELS[model_config.version]
    request = Request(torch.device(device), dtype, model_config.head_size)
    choice = select(operator, table, op, request)
    with torch.device("meta"):
        return RWKV(model_config, block, choice)
