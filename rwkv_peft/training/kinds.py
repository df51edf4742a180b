"""Which trained tensors are stepped together."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.models import lr_factors
from rwkv_peft.training.optimizers import optimizer_for

# bytes of a buffer's 16-bit numbers: an eighth of all within these bounds, as a step may have two
# float32 copies of a buffer, and costs a dozen launches; a larger tensor has its own
MIN_BUFFER, MAX_BUFFER = 4 * 2**20, 32 * 2**20


class Kind(NamedTuple):
    """What tensors have in common that are stepped as one."""

    dtype: torch.dtype
    clip_group: str
    lr_scale: float
    decays: bool
    optimizer: str
    is_shared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """What decides the kinds of trained tensors.

    Attributes:
        plain: names of the model's own tensors; the others are an adapter's or a state's.
        raises_rates: give the official higher rates to those vectors of the model.
        decays_adapter: let the weight decay act on matrices of the adapter too.
        clip_groups: which tensors are clipped together, by name; all that are not named.
        optimizer: one of `OPTIMIZERS`.
    """

    plain: Collection[str] = ()
    raises_rates: bool = False
    decays_adapter: bool = False
    clip_groups: Mapping[str, str] = field(default_factory=dict)
    optimizer: str = "adamw"

    def group(
        self, trained: Mapping[str, nn.Parameter], shared: Collection[str] = ()
    ) -> dict[Kind, list[str]]:
        """The names of trained tensors by their kinds.

        Args:
            shared: names of those of which other ranks have other parts.
        """
        kinds: dict[Kind, list[str]] = {}
        for name, parameter in trained.items():
            is_plain = name in self.plain
            is_matrix = parameter.ndim == 2 and (name.endswith(".weight") or not is_plain)
            decays = is_matrix and (is_plain or self.decays_adapter)
            rates = [rate for end, rate in lr_factors().items() if name.endswith(end)]
            scale = rates[0] if rates and is_plain and self.raises_rates else 1.0
            own = optimizer_for(self.optimizer, name, parameter)
            clip_group = self.clip_groups.get(name, "")
            kind = Kind(parameter.dtype, clip_group, scale, decays, own, name in shared)
            kinds.setdefault(kind, []).append(name)
        return kinds


def pack(parameters: Collection[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one 16-bit type in their order, as many at a time as go into a buffer."""
    share = sum(parameter.nbytes for parameter in parameters) // 8
    limit = min(max(share, MIN_BUFFER), MAX_BUFFER)
    together: list[Tensor] = []
    num_bytes = 0
    for parameter in parameters:
        if together and num_bytes + parameter.nbytes > limit:
            yield together
            together, num_bytes = [], 0
        together.append(parameter)
        num_bytes += parameter.nbytes
    yield together
