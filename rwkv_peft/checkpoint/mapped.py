"""Models that compute in float32 while their weights stay in a mapped file, in any dtype."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.checkpoint.pth import infer_model_config, load_weights
from rwkv_peft.methods import fast
from rwkv_peft.methods.merge import row_slices, split_rows
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.quant import Storage

# a tensor by its name in the model, as float32 pieces along its first dimension
Pieces = Callable[[], Iterable[Tensor]]


class Made(Protocol):
    """Tensors that are made when they are asked for, such as merged ones."""

    @property
    def names(self) -> set[str]:
        """Their names in the model."""

    def pieces(self, name: str) -> Iterable[Tensor]:
        """One as float32 pieces along its first dimension."""


def build_mapped(weights: Mapping[str, Tensor], storage: Storage | None = None) -> RWKV:
    """A frozen model whose parameters are the mapped tensors themselves, which costs no memory.

    With `storage` projections are stored by it, which costs the memory that they take so.
    """
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights, dtype=None, storage=storage)
    return model


def upcast_on_use(model: RWKV, merged: Made | None = None) -> RWKV:
    """The model itself, changed so that weights are float32 only while they are used.

    A linear layer converts a few rows at a time, any other layer its own tensors. An adapted layer
    computes by peft's own forward, which may read the weight itself. The new states of the blocks
    are dropped.

    Args:
        merged: tensors that take the place of the model's own, which must then be a plain one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def pieces(name: str, x: Tensor) -> Pieces:
        if merged is not None and name in merged.names:
            return lambda: merged.pieces(name)
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, FrozenLinear):
            slices = row_slices((layer.out_features, layer.in_features))
            return lambda: (layer.dense(torch.float32, rows) for rows in slices)
        return lambda: (piece.float() for piece in split_rows(x.detach()))

    whole: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in whole):
            continue
        is_whole = isinstance(module, BaseTunerLayer) and fast.form_of(module) is None
        if is_whole:
            # its forward may read the weight of the layer within, not only call it
            whole.append(path)
        tensors = {
            parameter: pieces(f"{path}.{name}", parameter)
            for name, parameter in module.named_parameters(recurse=is_whole)
            # one in fewer bits is read by `methods.stored`
            if parameter.is_floating_point() or not is_whole
        }
        # some layers of peft are linear layers too
        if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer):
            _compute_by(module, _make_linear(module, tensors[module.weight]))
        elif type(module) is nn.Embedding:
            is_made = merged is not None and f"{path}.weight" in merged.names
            rows = tensors[module.weight] if is_made else None
            _compute_by(module, _make_embedding(module, rows))
        elif tensors:
            _upcast_around(module, tensors)
    for block in model.blocks:
        # states that nobody goes on from, kept over all layers, would be the largest part
        block.register_forward_hook(lambda block, given, made: (*made[:2], None))
    return model


def _compute_by(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    vars(module)["forward"] = forward


def _make_linear(module: nn.Linear, rows: Pieces) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        columns = x.flatten(0, -2).t()
        y, start = x.new_empty(module.out_features, columns.shape[1]), 0
        for w in rows():
            torch.mm(w, columns, out=y[start : start + len(w)])
            start += len(w)
        y = y.t().contiguous().view(*x.shape[:-1], -1)
        return y if module.bias is None else y + module.bias.float()

    return forward


def _make_embedding(module: nn.Embedding, rows: Pieces | None) -> Callable[[Tensor], Tensor]:
    def forward(tokens: Tensor) -> Tensor:
        if rows is None:
            return F.embedding(tokens, module.weight).float()
        flat = tokens.flatten()
        y, start = torch.empty(len(flat), module.embedding_dim), 0
        for w in rows():
            here = ((flat >= start) & (flat < start + len(w))).nonzero().squeeze(1)
            y[here] = F.embedding(flat[here] - start, w)
            start += len(w)
        return y.view(*tokens.shape, -1)

    return forward


def _upcast_around(module: nn.Module, tensors: dict[nn.Parameter, Pieces]) -> None:
    stored: dict[nn.Parameter, Tensor] = {}

    def before(*_: Any) -> None:
        for parameter, pieces in tensors.items():
            stored[parameter] = parameter.data
            parameter.data = torch.cat(list(pieces()))

    def after(*_: Any) -> None:
        for parameter, data in stored.items():
            parameter.data = data

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
