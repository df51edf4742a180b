"""Weights with adapters added into them, one tensor at a time, in float32."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.methods.attach import ADAPTER, Attachment


class Addition(NamedTuple):
    """An adapted model and the weight with which its change is added."""

    model: nn.Module
    attachment: Attachment
    weight: float = 1.0


class MergedWeights:
    """Merged tensors by official name, made when they are asked for.

    The base weights of the adapted models may be mapped from disk in any type; only those of the
    module at hand are brought to float32. The arithmetic is peft's own, for any of its methods.
    """

    def __init__(self, base: Mapping[str, Tensor], additions: Sequence[Addition]) -> None:
        self._base, self._additions = base, additions
        self._owners = [_owners(a.model, a.attachment) for a in additions]

    @property
    def names(self) -> set[str]:
        """The tensors that an adapter may change."""
        return {name for owners in self._owners for name in owners}

    def tensor(self, name: str) -> Tensor:
        """The merged float32 tensor."""
        if len(self._additions) == 1 and self._additions[0].weight == 1:
            return self._merged(0, name)
        base = self._base[name].float()
        total = base.clone()
        for i, (owners, addition) in enumerate(zip(self._owners, self._additions, strict=True)):
            if name in owners:
                total.add_(self._merged(i, name).sub_(base), alpha=addition.weight)
        return total

    @torch.no_grad()
    def _merged(self, index: int, name: str) -> Tensor:
        owner = self._owners[index][name]
        leaf = name.rpartition(".")[2]
        if isinstance(owner, Tensor):
            return owner.detach().float().clone()
        if not hasattr(owner, "merge"):
            saved: Tensor = getattr(owner.modules_to_save[ADAPTER], leaf).detach()
            return saved.float().clone()
        base = owner.get_base_layer()
        stored = dict(base.named_parameters(recurse=False))
        data = {key: parameter.data for key, parameter in stored.items()}
        for key, parameter in stored.items():
            parameter.data = data[key].to(torch.float32, copy=True)
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


def _owners(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """Official name -> what makes its merged value: a tuner's layer, or a tensor of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    owners: dict[str, Any] = {name: attachment[name] for name in attachment.plain}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            leaves = module.get_base_layer().named_parameters(recurse=False)
        elif isinstance(module, ModulesToSaveWrapper):
            leaves = module.modules_to_save[ADAPTER].named_parameters(recurse=False)
        else:
            continue
        owners |= {f"{path.removesuffix('.token_adapter')}.{leaf}": module for leaf, _ in leaves}
    return owners
