"""What the modules of a method hold beside what is trained: projections, buffers, generators.

Most of it is made when the method is attached and stays: a frozen random projection, the places
that a sparse method trains, the factors of a base weight. Some of it changes in training. A run
that goes on needs both as they were, since another version of a library may draw other numbers.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.models.frozen import FrozenLinear

_Plain = (bool, int, float, str, type(None))


class Buffers:
    """What a model's modules hold beside its own weights and what is trained.

    Args:
        root: the model; with an adapter peft's view of it, whose tuner holds what layers share.
        known: the model's own weights, as they were before the method was attached, and what is
            trained.
    """

    def __init__(self, root: nn.Module, known: Collection[Tensor]) -> None:
        # held, since the identity of one that is gone may be that of another
        self._root, self._known = root, list(known)
        self._first = dict(self._plain())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, states of random generators, and plain values that training has changed."""
        plain = {k: x for k, x in self._plain() if k not in self._first or self._first[k] != x}
        return {
            "tensors": dict(self._tensors()),
            "generators": {name: x.get_state() for name, x in self._generators()},
            "plain": plain,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; what this model does not have is left out."""
        for name, x in self._tensors():
            if name in state["tensors"]:
                x.copy_(state["tensors"][name])
        for name, generator in self._generators():
            if name in state["generators"]:
                # a copy, as PyTorch reads such a tensor's storage from its beginning
                generator.set_state(state["generators"][name].clone())
        for key, value in state["plain"].items():
            path, attribute, *entry = key.split(":")
            holder = vars(self._root.get_submodule(path))
            if entry:
                holder[attribute][entry[0]] = value
            else:
                holder[attribute] = value

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        known = {id(x) for x in self._known}
        # a frozen layer that is stored anew has other scales than it had
        for layer in self._root.modules():
            if isinstance(layer, FrozenLinear):
                known.update(map(id, layer.buffers(False)))
        for name, x in (*self._root.named_parameters(), *self._root.named_buffers()):
            # of the model's own weights, and of no others, ranks may since hold parts
            if id(x) not in known and not hasattr(x, "full_tensor"):
                yield name, x
        yield from ((key, x) for key, x in self._attributes() if isinstance(x, Tensor))

    def _generators(self) -> Iterator[tuple[str, torch.Generator]]:
        return ((key, x) for key, x in self._attributes() if isinstance(x, torch.Generator))

    def _plain(self) -> Iterator[tuple[str, Any]]:
        return ((key, x) for key, x in self._attributes() if isinstance(x, _Plain))

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """What the modules of peft keep in attributes, and in dictionaries by an adapter's name."""
        for path, module in self._root.named_modules():
            if not type(module).__module__.startswith(("peft.", "rwkv_peft.methods")):
                continue
            for attribute, value in vars(module).items():
                # dictionaries of parameters, buffers, modules and hooks are PyTorch's
                if attribute.startswith("_") or attribute == "training":
                    continue
                if isinstance(value, dict):
                    for entry, x in value.items():
                        if isinstance(entry, str):
                            yield f"{path}:{attribute}:{entry}", x
                else:
                    yield f"{path}:{attribute}", value
