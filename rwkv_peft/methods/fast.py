"""LoRA and MiSS with a forward and backward of their own, in the fewest passes over (T, out).

T rows, r rank. A low-rank product is written into the output first; the product with the frozen
weight then adds to it in its epilogue, where reading the output costs next to nothing beside the
arithmetic. So there are no sums or scalings over (T, out), and nothing is kept for backward but
what a gradient needs: x and x A for LoRA, the folded x alone for MiSS.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse(model: nn.Module) -> int:
    """Gives the adapted layers of a model that can be fused their fast form; returns how many.

    They stay peft's own layers in all but their forward, so that saving and merging do not change.
    A layer that no fast form serves (DoRA, a bias, MiSS's 'bat', an embedding) is left alone.
    """
    count = 0
    for module in model.modules():
        if form := form_of(module):
            layer: Any = type(module)
            module.__class__ = _fast_class(layer, form.forward)
            count += 1
    return count


class Form(NamedTuple):
    """The arithmetic of one kind of layer.

    Attributes:
        forward: y (..., out) of a layer and x (..., in).
        add: adds the change of a layer's rows to these rows of its weight (rows, in), in place;
            called with the layer, the rows as a slice, and the weight.
    """

    forward: Callable[[Any, Tensor], Tensor]
    add: Callable[[Any, slice, Tensor], None]


def form_of(module: nn.Module) -> Form | None:
    """The fast form that serves a layer of peft's, if there is one."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.miss.layer import MissLinear

    if type(module) is LoraLinear and _is_plain(module) and _serves_lora(module):
        return Form(_lora, _add_lora)
    if type(module) is MissLinear and _is_plain(module) and _serves_miss(module):
        return Form(_miss, _add_miss)
    return None


@cache
def _fast_class(layer: Any, form: Any) -> type[nn.Module]:
    """The subclass of a peft layer whose forward is `form` while the adapter is at work."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.disable_adapters or self.merged or x.dtype != self.base_layer.weight.dtype:
            plain: Tensor = layer.forward(self, x)
            return plain
        y: Tensor = form(self, x)
        return y

    return type(f"Fast{layer.__name__}", (layer,), {"forward": forward})


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    return type(base) is nn.Linear and base.bias is None and not base.weight.requires_grad


def _weight(base: nn.Linear) -> Tensor:
    """The frozen weight (out, in) of a base layer, in the type of the computation."""
    return base.weight


def _serves_lora(layer: Any) -> bool:
    # a variant such as DoRA has a forward of its own
    return len(layer.lora_A) == 1 and not layer.lora_variant and not any(layer.lora_bias.values())


def _lora(layer: Any, x: Tensor) -> Tensor:
    (name,) = layer.lora_A
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    rate = _dropout(layer.lora_dropout[name])
    y: Tensor = _Lora.apply(x, _weight(layer.base_layer), a, b, layer.scaling[name], rate)
    return y


def _add_lora(layer: Any, rows: slice, weight: Tensor) -> None:
    (name,) = layer.lora_A
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    weight.addmm_(b[rows], a, alpha=layer.scaling[name])


def _serves_miss(layer: Any) -> bool:
    return len(layer.miss_block) == 1 and layer.miss_fn != "bat"


def _miss(layer: Any, x: Tensor) -> Tensor:
    (name,) = layer.miss_block
    rate = _dropout(layer.miss_dropout[name])
    y: Tensor = _Miss.apply(x, _weight(layer.base_layer), _miss_block(layer), rate)
    return y


def _miss_block(layer: Any) -> Tensor:
    """What every shard of r columns is multiplied with, (r, out)."""
    (name,) = layer.miss_block
    block: Tensor = layer.miss_block[name]
    if layer.miss_fn == "mini":
        block = block.repeat(1, layer.out_features // layer.miss_mini_r[name])
    return block


def _add_miss(layer: Any, rows: slice, weight: Tensor) -> None:
    shard = _miss_block(layer)[:, rows].t()
    whole = weight.shape[1] // shard.shape[1] * shard.shape[1]
    weight[:, :whole].unflatten(1, (-1, shard.shape[1])).add_(shard.unsqueeze(1))
    weight[:, whole:].add_(shard[:, : weight.shape[1] - whole])


def _dropout(module: nn.Module) -> float:
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _drop(x: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    if not rate:
        return x, None
    return torch.native_dropout(x, rate, True)


def _product(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """scale x @ y in one kernel."""
    out: Tensor = x.new_empty(x.shape[0], y.shape[1])
    out.addmm_(x, y, beta=0, alpha=scale)
    return out


class _Lora(torch.autograd.Function):
    """y = x W^T + s drop(x) A^T B^T for x (..., in), W (out, in) frozen, A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x, w, a, b, scale, rate):  # type: ignore[no-untyped-def]
        # rows are made here, where no view is an operation to differentiate
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask = _drop(rows, rate)
        u = dropped @ a.t()
        y = _product(u, b.t(), scale).addmm_(rows, w.t())
        ctx.scale, ctx.keep = scale, 1 - rate
        ctx.save_for_backward(x, w, a, b, u, mask)
        return y.view(*x.shape[:-1], len(w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, w, a, b, u, mask = ctx.saved_tensors
        shape, x, dy = x.shape, x.reshape(-1, x.shape[-1]), dy.reshape(-1, len(w))
        dx = da = db = None
        g = _product(dy, b, ctx.scale)
        if ctx.needs_input_grad[3]:
            db = _product(dy.t(), u, ctx.scale)
        if ctx.needs_input_grad[2]:
            da = g.t() @ (x if mask is None else (x * mask).div_(ctx.keep))
        if ctx.needs_input_grad[0]:
            dx = g @ a
            if mask is not None:
                dx.mul_(mask).div_(ctx.keep)
            dx = dx.addmm_(dy, w).view(shape)
        return dx, None, da, db, None, None


class _Miss(torch.autograd.Function):
    """y = x W^T + fold(drop(x)) D for x (..., in), W (out, in) frozen, D (r, out).

    fold sums the shards of r columns, the last of which may be short.
    """

    @staticmethod
    def forward(ctx: Any, x, w, d, rate):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask = _drop(rows, rate)
        u = _fold(dropped, len(d))
        y = (u @ d).addmm_(rows, w.t())
        ctx.keep, ctx.shape = 1 - rate, x.shape
        ctx.save_for_backward(w, d, u, mask)
        return y.view(*x.shape[:-1], len(w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        w, d, u, mask = ctx.saved_tensors
        dy = dy.reshape(-1, len(w))
        dd = u.t() @ dy if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _unfold(dy @ d.t(), ctx.shape[-1])
            if mask is not None:
                dx.mul_(mask).div_(ctx.keep)
            dx = dx.addmm_(dy, w).view(ctx.shape)
        return dx, None, dd, None


def _fold(x: Tensor, r: int) -> Tensor:
    whole = x.shape[1] // r * r
    u: Tensor = x[:, :whole].unflatten(1, (-1, r)).sum(1)
    if rest := x.shape[1] - whole:
        u[:, :rest] += x[:, whole:]
    return u


def _unfold(g: Tensor, width: int) -> Tensor:
    shards = -(-width // g.shape[1])
    spread = g.unsqueeze(1).expand(-1, shards, -1).flatten(1)
    return spread if spread.shape[1] == width else spread[:, :width].contiguous()
