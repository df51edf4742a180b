"""RWKV-7: time mixing by a state that is decayed, corrected and written, then channel mixing.

B batch, T time, D width, F feed-forward width, H heads, N head size.
Source: RWKV-LM, RWKV-v7/train_temp/src/model.py and rwkv_v7_demo_rnn.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.models.config import ModelConfig, Shapes, shape_of
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.models.initial import fresh_model
from rwkv_peft.models.layers import (
    GROUP_NORM_EPS,
    Block,
    PackingInfo,
    low_rank,
    shift_mix,
    shift_mix_products,
    squared_relu,
    vectors,
)
from rwkv_peft.models.project import project
from rwkv_peft.models.time_state import TIME_STATE
from rwkv_peft.models.version import Version
from rwkv_peft.ops.wkv7 import TABLE, Kernel, wkv7
from rwkv_peft.state import LayerState


class TimeMix(nn.Module):
    """Time mixing of one block; parameters are named as in official files."""

    def __init__(self, model_config: ModelConfig, layer: int, kernel: Kernel) -> None:
        super().__init__()
        D, H, N = model_config.n_embd, model_config.n_head, model_config.head_size
        ranks = model_config.ranks
        self.n_head, self.head_size, self.is_first, self.kernel = H, N, layer == 0, kernel

        # the order in which parameters are made is that in which they are stepped
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = vectors(6, D)
        self.w0, self.a0, self.k_k, self.k_a = vectors(4, D)
        has_value_mix = layer > 0 or model_config.has_first_value_mix
        if has_value_mix:
            (self.v0,) = vectors(1, D)
        self.w1, self.w2 = low_rank(D, ranks["w"])
        self.a1, self.a2 = low_rank(D, ranks["a"])
        self.g1, self.g2 = low_rank(D, ranks["g"])
        if has_value_mix:
            self.v1, self.v2 = low_rank(D, ranks["v"])
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = FrozenLinear(D, D)
        self.key = FrozenLinear(D, D)
        self.value = FrozenLinear(D, D)
        self.output = FrozenLinear(D, D)
        self.ln_x = nn.GroupNorm(H, D, eps=GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState | None,
        packing: PackingInfo,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed x (B, T, D), the first layer's values (B*T, D), the new wkv state."""
        B, T, D = x.shape
        N = self.head_size
        heads = (B, T, self.n_head, N)

        shift = None if state is None else state.att_shift
        has_value_mix = not self.is_first and v_first is not None
        (xr, xk, xv), (w, a, g, *others) = self._mix(x, shift, packing, has_value_mix)
        r, k, v = project((self.receptance, self.key, self.value), (xr, xk, xv))
        w = torch.addmm(self.w0.view(D), torch.tanh(w), self.w2)
        a = torch.sigmoid(torch.addmm(self.a0.view(D), a, self.a2))
        g = torch.sigmoid(g) @ self.g2

        if v_first is None or not others:
            v_first = v
        else:
            share = torch.sigmoid(torch.addmm(self.v0.view(D), others[0], self.v2))
            v = torch.lerp(v, v_first, share)
        # a and b hold -kk and kk a for kk of length 1; this kk has length sqrt(N), which is one
        # kernel, and only their product counts
        kk = F.rms_norm((k * self.k_k.view(D)).view(heads), (N,), eps=1e-24 / N)
        k = k * (1 + (a - 1) * self.k_a.view(D))

        r, k, v = r.view(heads), k.view(heads), v.view(heads)
        y, wkv = wkv7(
            r,
            w.view(heads),
            k,
            v,
            kk * (-1 / N),
            kk * a.view(heads),
            initial_state=None if state is None else state.wkv,
            segment_ids=packing.segment_ids,
            kernel=self.kernel,
        )
        y = self.ln_x(y.reshape(B * T, D)).view(heads)
        y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v
        mixed: Tensor = self.output(y.view(B * T, D) * g)
        return mixed.view(B, T, D), v_first, wkv

    def _mix(
        self, x: Tensor, shift: Tensor | None, packing: PackingInfo, has_value_mix: bool
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Rows for r, k and v, and products of rows with w1, a1, g1, and v1 if that is wanted."""
        wide, narrow = (self.x_r, self.x_k, self.x_v), [self.x_w, self.x_a, self.x_g]
        maps = [self.w1, self.a1, self.g1]
        if has_value_mix:
            narrow.append(self.x_v)
            maps.append(self.v1)
        # the gradients of what is trained would be small differences of large numbers
        is_frozen = not any(p.requires_grad for p in (*narrow, *maps))
        if torch.compiler.is_compiling() and is_frozen:
            rows = shift_mix(x, shift, packing, wide)
            return rows, shift_mix_products(x, shift, packing, narrow, maps)
        # the first three are what an adapter by default keeps, the others are seldom kept
        mixed = shift_mix(x, shift, packing, (*wide, *narrow[:3]), (3, 3))
        mapped = (*mixed[3:], mixed[2])
        return mixed[:3], [x @ w for x, w in zip(mapped, maps, strict=False)]


class ChannelMix(nn.Module):
    """Channel mixing of one block: a squared ReLU over shifted input."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, model_config.n_embd))
        self.key = FrozenLinear(model_config.n_embd, model_config.dim_ffn)
        self.value = FrozenLinear(model_config.dim_ffn, model_config.n_embd)

    def forward(self, x: Tensor, shift: Tensor | None, packing: PackingInfo) -> Tensor:
        """Mixed x (B, T, D)."""
        (k,) = shift_mix(x, shift, packing, (self.x_k,))
        mixed: Tensor = self.value(squared_relu(self.key(k)))
        return mixed.view_as(x)


def _block(model_config: ModelConfig, layer: int, kernel: Kernel) -> Block:
    att = TimeMix(model_config, layer, kernel)
    return Block(model_config, layer, att, ChannelMix(model_config))


def _read(shapes: Shapes) -> dict[str, Any]:
    # block 0 may have no value mix, and the narrowest model has no other block
    value_mix = "blocks.1.att.v1" if "blocks.1.att.v1" in shapes else "blocks.0.att.v1"
    has_value_mix = value_mix in shapes
    return {
        "n_head": shape_of(shapes, "blocks.0.att.r_k", 2)[0],
        "ranks": {
            "w": shape_of(shapes, "blocks.0.att.w1", 2)[1],
            "a": shape_of(shapes, "blocks.0.att.a1", 2)[1],
            "v": shape_of(shapes, value_mix, 2)[1] if has_value_mix else 0,
            "g": shape_of(shapes, "blocks.0.att.g1", 2)[1],
        },
        "has_first_value_mix": "blocks.0.att.v0" in shapes,
    }


VERSION = Version(
    name="x070",
    detect=lambda shapes: "blocks.0.att.r_k" in shapes,
    read=_read,
    block=_block,
    operator="wkv7",
    backends=TABLE,
    target_modules=("receptance", "key", "value", "output"),
    unread=frozenset({"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}),
    parts={"time": r"\.(x_[rwkvag]|[wav][012]|g[12]|k_k|k_a|r_k)$"},
    lr_factors={"att.w0": 2.0},
    state=TIME_STATE,
    fresh=fresh_model,
)
