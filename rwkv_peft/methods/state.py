"""State tuning: the state in which a text begins is learned, and nothing else."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.state import RWKVState


def shapes(model_config: ModelConfig, *, is_full: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state's tensors, as in files.

    `blocks.{i}.att.time_state` (H, N, N), rows = value, columns = key. A full state also has
    `att.ts_state` and `ffn.ts_state` (D,), what stands before the first token in the shifts.
    """
    heads = (model_config.n_head, model_config.head_size, model_config.head_size)
    found: dict[str, tuple[int, ...]] = {}
    for i in range(model_config.n_layer):
        found[f"blocks.{i}.att.time_state"] = heads
        if is_full:
            found[f"blocks.{i}.att.ts_state"] = (model_config.n_embd,)
            found[f"blocks.{i}.ffn.ts_state"] = (model_config.n_embd,)
    return found


def state_from(tensors: Mapping[str, Tensor], model_config: ModelConfig) -> RWKVState:
    """The state of one row from the tensors of a file, differentiable in them."""
    stacked = []
    for kind, width in (("att", model_config.n_embd), ("ffn", model_config.n_embd)):
        names = [f"blocks.{i}.{kind}.ts_state" for i in range(model_config.n_layer)]
        zeros = next(iter(tensors.values())).new_zeros(width)
        stacked.append(torch.stack([tensors.get(name, zeros) for name in names]).unsqueeze(1))
    wkv = [tensors[f"blocks.{i}.att.time_state"] for i in range(model_config.n_layer)]
    att, ffn = stacked
    return RWKVState(att, ffn, torch.stack(wkv).unsqueeze(1))


class LearnedStates(dict[str, nn.Parameter]):
    """Float32 states to train over one frozen model, zero at first.

    A single state has the names of its file; of several, each name begins with `STATE/`.

    Attributes:
        names: of the states; one empty name for a single one.
    """

    def __init__(self, model: RWKV, names: Sequence[str] = ("",), *, is_full: bool = False) -> None:
        self.names, self._model_config = tuple(names), model.model_config
        self._shapes = shapes(model.model_config, is_full=is_full)
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
        states = {name: state_from(self.tensors(name), self._model_config) for name in set(names)}
        if len(states) == 1:
            return states[names[0]].expand(len(names))
        rows = [states[name] for name in names]
        return RWKVState(
            torch.cat([row.att_shift for row in rows], 1),
            torch.cat([row.ffn_shift for row in rows], 1),
            torch.cat([row.wkv for row in rows], 1),
        )
