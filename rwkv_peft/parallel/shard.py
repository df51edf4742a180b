"""A trained tensor of which each rank has a part."""

from typing import Any

import torch
from torch import Tensor, nn


class Shard:
    """This rank's part of a trained tensor, cut along one dimension.

    Attributes:
        own: the part in float32, which an optimizer steps. FSDP2 gathers the whole from its memory.
    """

    def __init__(self, parameter: Any) -> None:
        """Takes a parameter as `fully_shard` leaves it, a DTensor."""
        self._parameter, self._dim = parameter, parameter.placements[0].dim
        self.own = nn.Parameter(parameter.detach().to_local())

    def take_gradient(self) -> None:
        """Moves what backward left for the parameter to `own`; over ranks it is summed already."""
        if (grad := self._parameter.grad) is not None:
            self.own.grad, self._parameter.grad = grad.to_local(), None

    @torch.no_grad()
    def gather(self, part: Tensor | None = None) -> Tensor:
        """The whole tensor, or another whose parts lie as its do; all ranks ask for it together."""
        from torch.distributed.tensor import DTensor

        of = self._parameter
        whole: Any = DTensor.from_local(
            self.own.detach() if part is None else part,
            of.device_mesh,
            of.placements,
            run_check=False,
            shape=of.shape,
            stride=of.stride(),
        )
        gathered: Tensor = whole.full_tensor()
        return gathered

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole shape."""
        mesh = self._parameter.device_mesh
        parts, rank = whole.chunk(mesh.size(), self._dim), mesh.get_local_rank()
        # the last ranks may have nothing
        return parts[rank] if rank < len(parts) else whole.narrow(self._dim, 0, 0)
