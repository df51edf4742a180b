"""RWKV-6: a state whose decay and whose token shifts depend on the input, and a gate.

B batch, T time, D width, F feed-forward width, H heads, N head size.
Source: RWKV-LM, RWKV-v5/src/model.py, `RWKV_Tmix_x060` and `RWKV_CMix_x060`.
"""

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
    shift_mix,
    squared_relu,
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
        ranks = model_config.ranks
        self.n_head, self.head_size, self.kernel = H, N, kernel
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vectors(3, D)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vectors(3, D)
        (self.time_decay,) = vectors(1, D)
        self.time_maa_w1 = nn.Parameter(torch.empty(D, 5 * ranks["maa"]))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, ranks["maa"], D))
        self.time_decay_w1 = nn.Parameter(torch.empty(D, ranks["decay"]))
        self.time_decay_w2 = nn.Parameter(torch.empty(ranks["decay"], D))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.receptance = FrozenLinear(D, D)
        self.key = FrozenLinear(D, D)
        self.value = FrozenLinear(D, D)
        self.gate = FrozenLinear(D, D)
        self.output = FrozenLinear(D, D)
        self.ln_x = nn.GroupNorm(H, D, eps=GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, carry: None, state: LayerState | None, packing: PackingInfo
    ) -> tuple[Tensor, None, Tensor]:
        """Mixed x (B, T, D), nothing to carry, and the new wkv state (B, H, N, N)."""
        B, T, D = x.shape
        heads = (B, T, self.n_head, self.head_size)

        shift = None if state is None else state.att_shift
        (xx,) = shift_mix(x, shift, packing, (self.time_maa_x,))
        mixes = torch.tanh(xx @ self.time_maa_w1).view(B * T, 5, -1).transpose(0, 1)
        names = ("w", "k", "v", "r", "g")
        fixed = torch.cat([getattr(self, f"time_maa_{name}") for name in names])
        mix = torch.baddbmm(fixed, mixes, self.time_maa_w2)
        xw, xk, xv, xr, xg = shift_mix(x, shift, packing, mix)
        narrow = torch.tanh(xw @ self.time_decay_w1)
        w = torch.addmm(self.time_decay.view(D), narrow, self.time_decay_w2)
        layers = self.key, self.value, self.receptance, self.gate
        k, v, r, g = project(layers, (xk, xv, xr, xg))

        y, wkv = wkv6(
            r.view(heads),
            w.view(heads),
            k.view(heads),
            v.view(heads),
            self.time_faaaa,
            initial_state=None if state is None else state.wkv,
            segment_ids=packing.segment_ids,
            kernel=self.kernel,
        )
        y = self.ln_x(y.reshape(B * T, D))
        mixed: Tensor = self.output(y * F.silu(g))
        return mixed.view(B, T, D), carry, wkv


class ChannelMix(nn.Module):
    """Channel mixing of one block: a squared ReLU over shifted input, let through by a gate."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        D = model_config.n_embd
        self.time_maa_k, self.time_maa_r = vectors(2, D)
        self.key = FrozenLinear(D, model_config.dim_ffn)
        self.receptance = FrozenLinear(D, D)
        self.value = FrozenLinear(model_config.dim_ffn, D)

    def forward(self, x: Tensor, shift: Tensor | None, packing: PackingInfo) -> Tensor:
        """Mixed x (B, T, D)."""
        xk, xr = shift_mix(x, shift, packing, (self.time_maa_k, self.time_maa_r))
        k = squared_relu(self.key(xk))
        mixed: Tensor = torch.sigmoid(self.receptance(xr)) * self.value(k)
        return mixed.view_as(x)


def _block(model_config: ModelConfig, layer: int, kernel: Kernel) -> Block:
    att = TimeMix(model_config, kernel)
    return Block(model_config, layer, att, ChannelMix(model_config))


def _read(shapes: Shapes) -> dict[str, Any]:
    return {
        "n_head": shape_of(shapes, "blocks.0.att.time_faaaa", 2)[0],
        "ranks": {
            "maa": shape_of(shapes, "blocks.0.att.time_maa_w2", 3)[1],
            "decay": shape_of(shapes, "blocks.0.att.time_decay_w1", 2)[1],
        },
    }


VERSION = Version(
    name="x060",
    detect=lambda shapes: "blocks.0.att.time_maa_x" in shapes,
    read=_read,
    block=_block,
    operator="wkv6",
    backends=TABLE,
    target_modules=("receptance", "key", "value", "output", "gate"),
    lr_factors={"att.time_decay": 2.0},
    state=TIME_STATE,
)
