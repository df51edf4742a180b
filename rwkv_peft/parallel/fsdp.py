"""A model of which each rank keeps a part, and gathers a block when it works with it (FSDP2)."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.models.awaited import load_awaited
from rwkv_peft.parallel.shard import Shard
from rwkv_peft.parallel.strategy import Ddp, Signalled, lost_in_one_line
from rwkv_peft.parallel.world import World


class Fsdp(Ddp):
    """Ranks share out frozen blocks, or all blocks with what is trained of the model itself.

    What is trained and not shared out is on each, as in `Ddp`. Every rank must go through the model
    as often as the others: a block is gathered by all of them together, forward and backward.
    """

    shares_model = True

    def __init__(self, world: World, interrupt: Signalled | None = None) -> None:
        super().__init__(world, interrupt)
        self.shards: dict[str, Shard] = {}
        self._shares_trained = False

    def shard(
        self, model: nn.Module, blocks: Iterable[nn.Module], weights: Iterable[Tensor]
    ) -> None:
        """Keeps this rank's part of those weights alone that are in blocks and frozen.

        What a block awaits is loaded when the one before it is shared out.

        Args:
            model: its other parts stay whole, and its method `hidden` goes through the blocks.
        """
        if self._shares_trained:
            return
        blocks = list(blocks)
        frozen = {id(x) for x in weights if not x.requires_grad}
        inner = {id(x) for block in blocks for x in block.parameters()} & frozen
        kept = {x for x in model.parameters() if id(x) not in inner}
        self._share_out(model, blocks, kept, load_awaited)

    def shard_trained(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        whole: Collection[str],
        dtype: torch.dtype,
        place: Callable[[Mapping[str, nn.Parameter]], None],
        *,
        gathers_once: bool,
    ) -> None:
        """Keeps this rank's part of what is trained, in float32, and of what is frozen in blocks.

        A block is computed in `dtype`. Its gradients are summed over ranks in float32 whenever a
        backward has gone through it. `shards` has what is trained from now on.

        Args:
            model: the other parameters of it stay whole, and its method `hidden` goes through the
                blocks.
            whole: names of those that stay whole in blocks, or though they are trained.
            place: brings parameters to the device in `dtype`, called with one block after another.
            gathers_once: a block stays whole in `dtype` from its forward to its backward.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        names = {x: name for name, x in model.named_parameters()}
        inner = {x for block in blocks for x in block.parameters()}
        kept = {
            x for x, name in names.items() if name in whole or not (x.requires_grad or x in inner)
        }

        def place_own(module: nn.Module) -> None:
            own = {names[x]: x for x in module.parameters() if x in names}
            place(own)
            for x in own.values():
                if x.requires_grad and x not in kept:
                    x.data = x.data.float()

        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        # None: the head, which backward takes first, stays whole in any case
        again = False if gathers_once else None
        blocks = list(blocks)
        self._share_out(
            model, blocks, kept, place_own, mp_policy=policy, reshard_after_forward=again
        )
        _sum_gradients((*blocks, model))
        self._shares_trained = True
        self.shards = {
            name: Shard(x)
            for name, x in model.named_parameters()
            if x.requires_grad and _is_part(x)
        }

    def _share_out(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        kept: Collection[nn.Parameter],
        place: Callable[[nn.Module], None],
        **options: Any,
    ) -> None:
        """Shares out blocks, and then the rest of a model, each as soon as it is in its place.

        Args:
            kept: what stays whole.
            place: brings what a module has to the device.
        """
        from torch.distributed.fsdp import register_fsdp_forward_method

        make: Callable[..., Any] | None = None
        # the rest is one too, by which the blocks know of each other, so that one is gathered while
        # another works
        for module in (*blocks, model):
            place(module)
            # parts are none, and all else is to be of them
            shared = [x for x in module.parameters() if x not in kept and not _is_part(x)]
            if make is None:
                # the embedding may be on the host
                device = next(module.parameters()).device
                make = _sharding(device, self.size, **options)
            for x in shared:
                x.data = x.data.contiguous()
            make(module, ignored_params=set(kept))
            for x in shared:
                # whoever knows them yet
                x.data = x.data.new_empty(0)
        register_fsdp_forward_method(model, "hidden")

    @torch.no_grad()
    def reduce(self, holders: Sequence[Tensor]) -> None:
        """Sums the gradients over ranks of tensors that each of them has as a whole."""
        parts = set()
        for shard in self.shards.values():
            shard.take_gradient()
            parts.add(shard.own)
        if whole := [x for x in holders if x not in parts]:
            super().reduce(whole)

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm () of what ranks have parts of, each with this norm."""
        squares = norm.square()
        with lost_in_one_line():
            self._dist.all_reduce(squares)
        return squares.sqrt()

    def make_scaler(self, kind: str, enabled: bool) -> torch.amp.GradScaler:
        """Scales losses, by the same on all ranks."""
        if not (enabled and self.shards):
            return super().make_scaler(kind, enabled)
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler(kind)

    def settle(self, model: nn.Module) -> None:
        """Gives up what is still whole after work without a backward."""
        found: Any = model
        if self._shares_trained:
            found.reshard()

    @contextmanager
    def whole(self, model: nn.Module, path: str) -> Iterator[None]:
        """Has a frozen block be whole on this rank, which every rank must ask for."""
        if self._shares_trained or not path:
            yield
            return
        self.ask("whole", path)
        block: Any = model.get_submodule(path)
        block.unshard()
        try:
            yield
        finally:
            block.reshard()


def _sharding(device: torch.device, size: int, **options: Any) -> Callable[..., Any]:
    """What shares out a module over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # a state that a block gives is a view, and nobody adds to one in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device.type, (size,))
    place = partial(_place, size)

    def make(module: nn.Module, ignored_params: set[nn.Parameter]) -> None:
        with _integers_without_gradients():
            fully_shard(
                module,
                mesh=mesh,
                shard_placement_fn=place,
                ignored_params=ignored_params,
                **options,
            )

    return make


@contextmanager
def _integers_without_gradients() -> Iterator[None]:
    """Has parameters of whole numbers, as stored weights are, be made as ones that are frozen.

    Before 2.12 PyTorch makes a part of a parameter as one that has a gradient, and then takes that
    away; whole numbers cannot have one even for that moment.
    """
    found: Any = nn.Parameter
    plain = found.__new__

    def make(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        is_whole = data is not None and not (data.is_floating_point() or data.is_complex())
        return plain(cls, data, requires_grad and not is_whole)

    found.__new__ = staticmethod(make)
    try:
        yield
    finally:
        found.__new__ = staticmethod(plain)


def _sum_gradients(modules: Iterable[Any]) -> None:
    """Has gradients be summed over ranks, as losses are divided by what all ranks have."""
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _place(size: int, parameter: nn.Parameter) -> Any:
    """The dimension along which a tensor is cut: another than the first where that is short."""
    from torch.distributed.tensor import Shard as Cut

    dims = [d for d, n in enumerate(parameter.shape) if n % size == 0]
    return Cut(0 if parameter.shape[0] >= size or not dims else dims[0])


def _is_part(x: nn.Parameter) -> bool:
    return hasattr(x, "full_tensor")
