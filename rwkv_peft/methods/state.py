"""State tuning: the state in which a text begins is learned, and nothing else."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState


class LearnedStates(dict[str, nn.Parameter]):
    """Float32 states to train over one frozen model, zero at first.

    A single state has the names of its file; of several, each name begins with `STATE/`.

    Attributes:
        names: of the states; one empty name for a single one.
    """

    def __init__(self, model: RWKV, names: Sequence[str] = ("",), *, is_full: bool = False) -> None:
        self.names, self._model_config = tuple(names), model.model_config
        self._format = model.version.state
        self._shapes = self._format.shapes(model.model_config, is_full)
        device = model.emb.weight.device
        model.requires_grad_(False)
        super().__init__(
            (self.key(name, tensor), nn.Parameter(torch.zeros(shape, device=device)))
            for name in self.names
            for tensor, shape in self._shapes.items()
        )

    @staticmethod
    def key(name: str, tensor: str) -> str:
        """The name of a state's tensor among all that are trained."""
        return f"{name}/{tensor}" if name else tensor

    def tensors(self, name: str, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of one state by their names in files, from `values` if given."""
        found: Mapping[str, Tensor] = self if values is None else values
        return {tensor: found[self.key(name, tensor)] for tensor in self._shapes}

    def rows(self, names: Sequence[str]) -> RWKVState:
        """The state of a batch whose rows begin with the states of these names.

        A state that no row begins with gets no gradient, and its optimizer does not step.
        """
        states = {
            name: self._format.to_state(self.tensors(name), self._model_config)
            for name in set(names)
        }
        if len(states) == 1:
            return states[names[0]].expand(len(names))
        rows = (states[name] for name in names)
        return RWKVState(*(torch.cat(parts, 1) for parts in zip(*rows, strict=True)))
