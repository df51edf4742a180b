"""LoRA and MiSS with a forward and backward of their own, in the fewest passes over (T, out).

T rows, r rank. A low-rank product is written into the output first; the product with the frozen
weight then adds to it in its epilogue, where reading the output costs next to nothing beside the
arithmetic (the narrow one adds to a product of FP8, which cannot). So nothing else sums or scales
over (T, out), and only what a gradient needs is kept for backward: x and x A^T for LoRA, x A^T
alone for MiSS.

MiSS adds the sum of x over shards of r columns, times D (r, out). That is LoRA with B = D^T and a
fixed A of ones and zeros, which says which column belongs to which row of D. On a GPU the product
with A is quicker than a sum over shards, and the product with its transpose quicker than a copy to
them. Both are as exact as these: the factors are 1 or 0, and sums are in float32 (where TF32 is
allowed, x is rounded for W too).

A short step is bound by the host, a dozen microseconds a layer, so tensors are read from the
dictionaries of modules: `nn.Module.__getattr__` and peft's containers cost as much as a product.
The frozen layer adds its two products itself, in whatever form it stores its weight; so the weight
is not among the saved tensors.

In a compiled block the narrow products of layers that are alike are one batch, as alone they leave
most of a GPU idle (`models/project.py`). The compiler writes rows straight into the batch; what it
costs is a copy of the adapters.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.methods.miss import shards, whole_block
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.ops.autograd import once_differentiable


def fuse(model: nn.Module) -> int:
    """Gives the adapted layers of a model that can be fused their fast form; returns how many.

    They stay peft's own layers in all but their forward, so that saving and merging do not change.
    A layer that no fast form serves (DoRA, a bias, MiSS's 'bat', an embedding) is left alone.
    """
    count = 0
    for module in model.modules():
        if form := form_of(module):
            layer: Any = module
            (name,) = layer.active_adapters
            layer.fused_adapter = name
            if form.change is _miss:
                # laid here, as a compiler would compute it in every step
                block = whole_block(layer, name)
                base = layer.base_layer
                layer.fused_shards = _shards(
                    block.shape[0], base.in_features, block.device, base.compute_dtype
                )
            own: Any = type(module)
            module.__class__ = _fast_class(own, form.change)
            count += 1
    return count


class LowRank(NamedTuple):
    """What an adapter adds to the product of a frozen layer: s drop(x) A^T B^T for x (T, in).

    Attributes:
        a: A (r, in).
        b: B (out, r), or (r, out) if `is_turned`.
        scale, rate: s, and the share of numbers that are dropped.
    """

    a: Tensor
    b: Tensor
    scale: float
    rate: float
    is_turned: bool


class Form(NamedTuple):
    """The arithmetic of one kind of layer.

    Attributes:
        change: what a layer with an adapter of this name adds to a product of x.
        add: adds the change of a layer's rows to these rows of its weight (rows, in), in place;
            called with the layer, the rows as a slice, and the weight.
    """

    change: Callable[[Any, str, Tensor], LowRank]
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
def _fast_class(own: Any, change: Any) -> type[nn.Module]:
    """The subclass of a peft layer that does its `change` while its one adapter is at work."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _is_at_work(self, x):
            plain: Tensor = own.forward(self, x)
            return plain
        # the models give rows, for which no view has to be made and differentiated
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        base = self._modules["base_layer"]
        y: Tensor = _LowRank.apply(rows, base, *change(self, self.fused_adapter, rows))
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)

    def together(layers: Sequence[Any], xs: Sequence[Tensor]) -> Sequence[Tensor] | None:
        pairs = list(zip(layers, xs, strict=True))
        if not all(type(layer) is type(layers[0]) and _is_at_work(layer, x) for layer, x in pairs):
            return None
        bases = [layer._modules["base_layer"] for layer in layers]
        changes = [change(layer, layer.fused_adapter, x) for layer, x in pairs]
        return _add_together(bases, changes, xs) if _are_alike(bases, changes) else None

    members = {"forward": forward, "together": staticmethod(together)}
    return type(f"Fast{own.__name__}", (own,), members)


def _is_at_work(layer: Any, x: Tensor) -> bool:
    is_active = layer.active_adapters == [layer.fused_adapter] and not layer.disable_adapters
    dtype = layer._modules["base_layer"].compute_dtype
    return is_active and not layer.merged and x.dtype == dtype


def _are_alike(bases: Sequence[FrozenLinear], changes: Sequence[LowRank]) -> bool:
    """Whether `_add_together` serves: one shape, one scale, no dropout, no order of its own."""
    first = changes[0]
    alike = [
        (x.a.shape, x.b.shape, x.scale, x.rate) == (first.a.shape, first.b.shape, first.scale, 0)
        for x in changes
    ]
    plus = FrozenLinear.product_plus
    return all(alike) and all(type(base).product_plus is plus for base in bases)


def _add_together(
    bases: Sequence[FrozenLinear], changes: Sequence[LowRank], xs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """What layers with these changes give for their xs (..., in), each (..., out)."""
    a, _, scale, _, is_turned = changes[0]
    # MiSS has one A for all
    first = a.expand(len(xs), -1, -1) if is_turned else torch.stack([x.a for x in changes])
    second = torch.stack([x.b for x in changes])
    rows = [x.reshape(-1, x.shape[-1]) for x in xs]
    ys = _LowRanks.apply(bases, first, second, scale, is_turned, *rows)
    return [y.view(*x.shape[:-1], -1) for x, y in zip(xs, ys, strict=True)]


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    is_alone = len(layer.active_adapters) == 1
    return is_alone and isinstance(base, FrozenLinear) and not base.weight.requires_grad


def _serves_lora(layer: Any) -> bool:
    # a variant such as DoRA has a forward of its own
    return len(layer.lora_A) == 1 and not layer.lora_variant and not any(layer.lora_bias.values())


def _lora_matrices(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of an adapter."""
    first, second = (layer._modules[key]._modules[name] for key in ("lora_A", "lora_B"))
    return first._parameters["weight"], second._parameters["weight"]


def _lora(layer: Any, name: str, _: Tensor) -> LowRank:
    rate = _dropout(layer._modules["lora_dropout"]._modules[name])
    return LowRank(*_lora_matrices(layer, name), layer.scaling[name], rate, False)


def _add_lora(layer: Any, rows: slice, weight: Tensor) -> None:
    (name,) = layer.lora_A
    a, b = _lora_matrices(layer, name)
    weight.addmm_(b[rows], a, alpha=layer.scaling[name])


def _serves_miss(layer: Any) -> bool:
    return len(layer.miss_block) == 1 and layer.miss_fn != "bat"


def _miss(layer: Any, name: str, x: Tensor) -> LowRank:
    rate = _dropout(layer._modules["miss_dropout"]._modules[name])
    d = whole_block(layer, name)
    a = layer.fused_shards
    if a.shape[0] != d.shape[0] or a.dtype != x.dtype or a.device != x.device:
        a = _shards(d.shape[0], x.shape[-1], x.device, x.dtype)
    return LowRank(a, d, 1, rate, True)


# kept for the process and not in a layer: it is never trained, saved or moved, and is small
@cache
def _shards(rank: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A (r, in) of MiSS: 1 where column mod r is the row; one for all layers of a shape."""
    # an answer may ask for it before training does
    with torch.inference_mode(False):
        return shards(rank, width, device).to(dtype)


def _add_miss(layer: Any, rows: slice, weight: Tensor) -> None:
    (name,) = layer.miss_block
    shard = whole_block(layer, name)[:, rows].t()
    whole = weight.shape[1] // shard.shape[1] * shard.shape[1]
    weight[:, :whole].unflatten(1, (-1, shard.shape[1])).add_(shard.unsqueeze(1))
    weight[:, whole:].add_(shard[:, : weight.shape[1] - whole])


def _dropout(module: nn.Module) -> float:
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _drop(x: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    if not rate:
        return x, None
    return torch.native_dropout(x, rate, True)


def _product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale x @ y in one kernel."""
    if scale == 1:
        return torch.mm(x, y)
    out: Tensor = x.new_empty(x.shape[0], y.shape[1])
    return out.addmm_(x, y, beta=0, alpha=scale)


def _products(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale x @ y of each pair of a batch, in one kernel."""
    if scale == 1:
        return torch.bmm(x, y)
    out: Tensor = x.new_empty(*x.shape[:2], y.shape[2])
    return out.baddbmm_(x, y, beta=0, alpha=scale)


class _LowRank(torch.autograd.Function):
    """y = x W^T + the change of a `LowRank`, for x (T, in), W (out, in) of a frozen layer."""

    @staticmethod
    def forward(ctx: Any, x, base, a, b, scale, rate, is_turned):  # type: ignore[no-untyped-def]
        dropped, mask = _drop(x, rate)
        # u is scaled because it is narrow; B's gradient needs it scaled too
        u = _product(dropped, a.t(), scale)
        ctx.base, ctx.scale, ctx.keep, ctx.is_turned = base, scale, 1 - rate, is_turned
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, u, mask)
        return base.product_plus(x, u, b if is_turned else b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, a, b, u, mask = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dx = da = db = None
        if needs_b:
            db = torch.mm(u.t(), dy) if ctx.is_turned else torch.mm(dy.t(), u)
        if needs_x or needs_a:
            g = _product(dy, b.t() if ctx.is_turned else b, ctx.scale)
        if needs_a:
            da = torch.mm(g.t(), x if mask is None else (x * mask).div_(ctx.keep))
        if needs_x and mask is None:
            dx = ctx.base.transposed_plus(dy, g, a)
        elif needs_x:
            dx = torch.mm(g, a).mul_(mask).div_(ctx.keep)
            ctx.base.add_transposed(dx, dy)
        return dx, None, da, db, None, None, None


class _LowRanks(torch.autograd.Function):
    """`_LowRank` of several layers of one shape, the narrow products of all as one batch."""

    @staticmethod
    def forward(ctx: Any, bases, a, b, scale, is_turned, *xs):  # type: ignore[no-untyped-def]
        # beside each other for each token: so what mixes it reads it once
        x = torch.stack(xs, 1).transpose(0, 1)
        u = _products(x, a.mT, scale)
        ctx.bases, ctx.scale, ctx.is_turned = bases, scale, is_turned
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, b, u)
        y = torch.bmm(u, b if is_turned else b.mT)
        return tuple(base.add_product(y[i], x[i]) for i, base in enumerate(bases))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys):  # type: ignore[no-untyped-def]
        x, a, b, u = ctx.saved_tensors
        _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = torch.stack(dys)
        da = db = None
        if needs_b:
            db = torch.bmm(u.mT, dy) if ctx.is_turned else torch.bmm(dy.mT, u)
        g = _products(dy, b.mT if ctx.is_turned else b, ctx.scale)
        if needs_a:
            da = torch.bmm(g.mT, x)
        dx = torch.bmm(g, a)
        dxs = [base.add_transposed(dx[i], dy[i]) for i, base in enumerate(ctx.bases)]
        return None, da, db, None, None, *dxs
