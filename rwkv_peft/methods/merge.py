"""Weights with adapters added into them, a piece at a time, in float32."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.methods import fast
from rwkv_peft.methods.attach import ADAPTER, Attachment
from rwkv_peft.methods.options import one_line
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.frozen import FrozenLinear

# elements that are float32 at a time: few enough for a processor's cache
PIECE = 1 << 18


class Addition(NamedTuple):
    """An adapted model and the weight with which its change is added.

    Attributes:
        check: looks at the pieces of a merged tensor as they pass, given its name, the pieces and
            the base's tensor; None: nobody does.
    """

    model: RWKV
    attachment: Attachment
    weight: float = 1.0
    check: Callable[[str, Iterator[Tensor], Tensor], Iterator[Tensor]] | None = None


class MergedWeights:
    """Merged tensors by official name, made when they are asked for, a few rows at a time.

    The base weights of the adapted models may be mapped from disk in any dtype; only the rows that
    are being merged are converted to float32. LoRA and MiSS are added by `methods.fast` to a few
    rows at a time. Any other method is merged by peft's own code, one module at a time.
    """

    def __init__(self, base: Mapping[str, Tensor], additions: Sequence[Addition]) -> None:
        self._base, self._additions = base, additions
        self._owners = [find_owners(a.model, a.attachment) for a in additions]

    @property
    def names(self) -> set[str]:
        """The tensors that an adapter may change."""
        return {name for owners in self._owners for name in owners}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The merged float32 tensor, as pieces along its first dimension.

        base + sum of weight x (merged with one adapter - base).
        """
        changed = [i for i, owners in enumerate(self._owners) if name in owners]
        values = [self._checked(i, name) for i in changed]
        weights = [self._additions[i].weight for i in changed]
        if weights == [1]:
            yield from values[0]
            return
        for base, *parts in zip(split_rows(self._base[name]), *values, strict=True):
            base = base.float()
            total = base.clone()
            for weight, part in zip(weights, parts, strict=True):
                total.add_(part.sub_(base), alpha=weight)
            yield total

    def _checked(self, index: int, name: str) -> Iterator[Tensor]:
        pieces, check = self._merged(index, name), self._additions[index].check
        return pieces if check is None else check(name, pieces, self._base[name])

    @torch.no_grad()
    def _merged(self, index: int, name: str) -> Iterator[Tensor]:
        """The tensor with one adapter merged, as pieces of its own memory."""
        owner = self._owners[index][name]
        leaf = name.rpartition(".")[2]
        if isinstance(owner, Tensor):
            return (x.float().clone() for x in split_rows(owner.detach()))
        if form := fast.form_of(owner):
            return _added(owner, form)
        with one_line(f"{name} cannot be merged"):
            return iter(split_rows(merge_by_peft(owner, leaf)))


def split_rows(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor as views of about `PIECE` elements along its first dimension."""
    if x.ndim == 0:
        return (x,)
    return tuple(x[rows] for rows in row_slices(x.shape))


def row_slices(shape: Sequence[int]) -> list[slice]:
    """The pieces into which `split` cuts a tensor of this shape."""
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    return [slice(start, start + step) for start in range(0, max(1, shape[0]), step)]


@torch.no_grad()
def _added(owner: Any, form: fast.Form) -> Iterator[Tensor]:
    base: FrozenLinear = owner.get_base_layer()
    for rows in row_slices((base.out_features, base.in_features)):
        merged = base.dense(torch.float32, rows, copy=True)
        form.add(owner, rows, merged)
        yield merged


def merge_by_peft(owner: Any, leaf: str) -> Tensor:
    """The merged float32 tensor of a layer, by peft's own code; the layer stays as it was."""
    base = owner.get_base_layer()
    stored = dict(base.named_parameters(recurse=False))
    data = {key: parameter.data for key, parameter in stored.items()}
    for key, parameter in stored.items():
        parameter.data = (
            base.dense(torch.float32, copy=True)
            if isinstance(base, FrozenLinear)
            else data[key].to(torch.float32, copy=True)
        )
    owner.merge()
    merged: Tensor = getattr(owner.get_base_layer(), leaf).detach()
    # put back as it was, not by peft's own way back, which would compute and round
    if owner.get_base_layer() is not base:
        owner.unmerge()
    owner.merged_adapters.clear()
    for key, parameter in stored.items():
        parameter.data = data[key]
        setattr(base, key, parameter)
    return merged


def find_owners(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """Official name -> what makes its merged value: a tuner's layer, or a tensor of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    owners: dict[str, Any] = {name: attachment[name] for name in attachment.plain}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            leaves = module.get_base_layer().named_parameters(recurse=False)
            path = path.removesuffix(".token_adapter")
            owners |= {f"{path}.{leaf}": module for leaf, _ in leaves}
        elif isinstance(module, ModulesToSaveWrapper):
            # it may be a whole block
            saved = module.modules_to_save[ADAPTER].named_parameters()
            owners |= {f"{path}.{leaf}": x for leaf, x in saved}
    return owners
