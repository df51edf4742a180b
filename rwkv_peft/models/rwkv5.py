"""RWKV-5: a state of matrix value with a constant decay, a head (5.0, 5.1) or a channel (5.2).

B batch, T time, D width, F feed-forward width, H heads, N head size.
Source: RWKV-LM, RWKV-v5/src/model.py, `RWKV_TimeMix_RWKV5`; ChatRWKV for 5.0 and 5.1.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.models.config import ModelConfig, Shapes, shape_of
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.models.layers import (
    GROUP_NORM_EPS,
    Block,
    PackingInfo,
    squared_relu,
    token_shift,
    vectors,
)
from rwkv_peft.models.project import project
from rwkv_peft.models.time_state import TIME_STATE
from rwkv_peft.models.version import Version
from rwkv_peft.ops.wkv6 import TABLE, Kernel, wkv6
from rwkv_peft.state import LayerState


class TimeMix(nn.Module):
    """Time mixing of one block; parameters are named as in official files."""

    def __init__(self, model_config: ModelConfig, kernel: Kernel) -> None:
        super().__init__()
        D, H, N = model_config.n_embd, model_config.n_head, model_config.head_size
        self.n_head, self.head_size, self.kernel = H, N, kernel
        self.has_time_first = model_config.has_time_first
        self.has_gate = model_config.version != "x050"
        self.time_mix_k, self.time_mix_v, self.time_mix_r = vectors(3, D)
        own = (H, N) if model_config.version == "x052" else (H,)
        self.time_decay = nn.Parameter(torch.empty(own))
        if self.has_time_first:
            self.time_first = nn.Parameter(torch.empty(own))
        else:
            self.time_faaaa = nn.Parameter(torch.empty(own))
        self.receptance = FrozenLinear(D, D)
        self.key = FrozenLinear(D, D)
        self.value = FrozenLinear(D, D)
        self.output = FrozenLinear(D, D)
        if self.has_gate:
            (self.time_mix_g,) = vectors(1, D)
            self.gate = FrozenLinear(D, D)
        self.ln_x = nn.GroupNorm(H, D, eps=GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, carry: None, state: LayerState | None, packing: PackingInfo
    ) -> tuple[Tensor, None, Tensor]:
        """Mixed x (B, T, D), nothing to carry, and the new wkv state (B, H, N, N)."""
        B, T, D = x.shape
        heads = (B, T, self.n_head, self.head_size)

        last = token_shift(x, None if state is None else state.att_shift, packing)
        mixes = self.time_mix_k, self.time_mix_v, self.time_mix_r
        rows = [torch.lerp(last, x, mix) for mix in mixes]
        k, v, r = project((self.key, self.value, self.receptance), rows)

        u = torch.exp(self.time_first) if self.has_time_first else self.time_faaaa
        y, wkv = wkv6(
            r.view(heads),
            self.time_decay.view(self.n_head, -1).expand(heads),
            k.view(heads),
            v.view(heads),
            u.view(self.n_head, -1).expand(heads[2:]),
            initial_state=None if state is None else state.wkv,
            segment_ids=packing.segment_ids,
            kernel=self.kernel,
        )
        y = self.ln_x(y.reshape(B * T, D)).view(B, T, D)
        if self.has_gate:
            y = y * F.silu(self.gate(torch.lerp(last, x, self.time_mix_g)))
        mixed: Tensor = self.output(y)
        return mixed, carry, wkv


class ChannelMix(nn.Module):
    """Channel mixing of one block: a squared ReLU over shifted input, let through by a gate."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        D = model_config.n_embd
        self.time_mix_k, self.time_mix_r = vectors(2, D)
        self.key = FrozenLinear(D, model_config.dim_ffn)
        self.receptance = FrozenLinear(D, D)
        self.value = FrozenLinear(model_config.dim_ffn, D)

    def forward(self, x: Tensor, shift: Tensor | None, packing: PackingInfo) -> Tensor:
        """Mixed x (B, T, D)."""
        last = token_shift(x, shift, packing)
        k = squared_relu(self.key(torch.lerp(last, x, self.time_mix_k)))
        r = torch.sigmoid(self.receptance(torch.lerp(last, x, self.time_mix_r)))
        mixed: Tensor = r * self.value(k)
        return mixed


def _block(model_config: ModelConfig, layer: int, kernel: Kernel) -> Block:
    att = TimeMix(model_config, kernel)
    return Block(model_config, layer, att, ChannelMix(model_config))


def _detected_name(shapes: Shapes) -> str:
    decay = shapes.get("blocks.0.att.time_decay")
    if decay is None or "blocks.0.att.ln_x.weight" not in shapes:
        return ""
    if "blocks.0.att.gate.weight" not in shapes:
        return "x050"
    return "x052" if len(decay) == 2 and decay[1] > 1 else "x051"


def _read(shapes: Shapes) -> dict[str, Any]:
    # (H,), or (H, N) from 5.2 on
    ndim = 2 if _detected_name(shapes) == "x052" else 1
    return {
        "n_head": shape_of(shapes, "blocks.0.att.time_decay", ndim)[0],
        "has_time_first": "blocks.0.att.time_first" in shapes,
    }


_X052 = Version(
    name="x052",
    detect=lambda shapes: _detected_name(shapes) == "x052",
    read=_read,
    block=_block,
    operator="wkv6",
    backends=TABLE,
    target_modules=("receptance", "key", "value", "output", "gate"),
    lr_factors={"att.time_decay": 2.0, "att.time_first": 3.0},
    state=TIME_STATE,
)
VERSIONS = (
    _X052,
    replace(_X052, name="x051", detect=lambda shapes: _detected_name(shapes) == "x051"),
    replace(
        _X052,
        name="x050",
        detect=lambda shapes: _detected_name(shapes) == "x050",
        target_modules=("receptance", "key", "value", "output"),
    ),
)
