"""A base of which each rank keeps a part, and gathers a block whenever it works with it (FSDP2)."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rwkv_peft.parallel.strategy import Ddp


class Fsdp(Ddp):
    """Frozen blocks are shared out among ranks; what is trained is on each, as in `Ddp`.

    Every rank must go through the model as often as the others: a block is gathered by all of them
    together, forward and backward.
    """

    shares_model = True

    def shard(
        self, model: nn.Module, blocks: Iterable[nn.Module], weights: Iterable[Tensor]
    ) -> None:
        """Keeps this rank's part of those weights alone that are in blocks and frozen.

        Args:
            model: its other parts stay whole, and its method `hidden` goes through the blocks.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # a state that a block gives is a view, and nobody adds to one in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        blocks = list(blocks)
        frozen = {id(x) for x in weights if not x.requires_grad}
        inner = {id(x) for block in blocks for x in block.parameters()} & frozen
        whole = {x for x in model.parameters() if id(x) not in inner}
        # the embedding may be on the host
        kind = next(blocks[0].parameters()).device.type
        mesh = init_device_mesh(kind, (self.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=whole)
        # by which the blocks know of each other, and one is gathered while another works
        fully_shard(model, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(model, "hidden")

    @contextmanager
    def whole(self, model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Has all blocks be whole on this rank, which every rank must ask for; then shares them."""
        found: list[Any] = list(blocks)
        self.ask("whole")
        for block in found:
            block.unshard()
        try:
            yield
        finally:
            for block in found:
                block.reshard()
