"""What ranks share and how; one device alone shares nothing."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rwkv_peft.config import TrainConfig
from rwkv_peft.device import resolve_device
from rwkv_peft.errors import ConfigError, LostRankError
from rwkv_peft.parallel.shard import Shard
from rwkv_peft.parallel.watch import Watch
from rwkv_peft.parallel.world import World, find_world

# bytes of gradients that are reduced at once; larger tensors go alone, as they lie
BUCKET = 25 * 2**20
# until all are there; afterwards it is `Watch` that finds who is lost, however long a rank works
JOINING, WORKING = timedelta(minutes=10), timedelta(days=7)


class Signalled(Protocol):
    """Who hears the signals of a process.

    Attributes:
        signal: number of the first, 0 if none came.
    """

    signal: int


class Strategy:
    """One device: it has nothing to share.

    Attributes:
        rank, size: this process's number from 0, and how many there are.
        local_rank, local_size: on this machine.
        interrupt: what hears of signals, so that one that any rank gets is known to all.
        shares_model: each rank has a part of the model alone.
        shards: of what is trained, that of which each rank has a part alone, by name.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    interrupt: Signalled | None = None
    shares_model = False
    shards: Mapping[str, Shard] = {}

    @property
    def in_parts(self) -> Collection[str]:
        """Names of what is trained of which each rank has a part alone."""
        return self.shards.keys()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Numbers of the host, summed over ranks."""
        return list(values)

    def gather(self, x: Tensor, count: int) -> Tensor:
        """(count,) the numbers of all micro-batches, in their order, of the (n,) of this rank."""
        return x

    def reduce(self, holders: Sequence[Tensor]) -> None:
        """Sums the gradients of tensors over ranks; who has none has zeros, if another has one."""

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm () of what ranks have parts of, each with this norm."""
        return norm

    def make_scaler(self, kind: str, enabled: bool) -> torch.amp.GradScaler:
        """Scales losses against underflow if it is enabled, on devices of a kind."""
        return torch.amp.GradScaler(kind, enabled=enabled)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors the values that they have on rank 0."""

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on every rank."""
        return make()

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks on rank 0, anything elsewhere."""
        return [value]

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        return [value]

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """What each rank makes, the first of a machine before the others, for which it may help."""
        return make()

    def ask(self, what: str, *values: Any) -> None:
        """Has the others do something, which rank 0 is about to do with them."""

    def shard(
        self, model: nn.Module, blocks: Iterable[nn.Module], weights: Iterable[Tensor]
    ) -> None:
        """Keeps this rank's part of those weights alone that are in blocks, if ranks share them."""

    def settle(self, model: nn.Module) -> None:
        """Gives up what is still whole of a model after work without a backward."""

    def whole(self, model: nn.Module, path: str) -> AbstractContextManager[None]:
        """Has a frozen block be whole on this rank, which every rank must ask for.

        Args:
            path: of the block in the model; empty for none.
        """
        return nullcontext()


class Ddp(Strategy):
    """Every rank has all of the model and learns from its own rows; gradients are summed."""

    def __init__(self, world: World, interrupt: Signalled | None = None) -> None:
        import torch.distributed

        self._dist: Any = torch.distributed
        self.world, self.interrupt = world, interrupt
        # what must be done before the ranks part
        self.endings: list[Callable[[], None]] = []
        self.rank, self.size = world.rank, world.size
        self.local_rank, self.local_size = world.local_rank, world.local_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Numbers of the host, summed over ranks, which hear of each other's signals too."""
        own = self.interrupt.signal if self.interrupt else 0
        signals = torch.zeros(self.size, dtype=torch.float64)
        signals[self.rank] = own
        together = torch.cat((torch.tensor(values, dtype=torch.float64), signals))
        with lost_in_one_line():
            self._dist.all_reduce(together)
        numbers: list[float] = together.tolist()
        heard = next((int(x) for x in numbers[len(values) :] if x), 0)
        if self.interrupt and heard and not own:
            self.interrupt.signal = heard
        return numbers[: len(values)]

    def gather(self, x: Tensor, count: int) -> Tensor:
        """(count,) the numbers of all micro-batches, in their order, of the (n,) of this rank."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with lost_in_one_line():
            self._dist.all_gather(parts, x)
        return torch.stack(parts, 1).flatten()[:count]

    @torch.no_grad()
    def reduce(self, holders: Sequence[Tensor]) -> None:
        """Sums the gradients of tensors over ranks; who has none has zeros, if another has one."""
        has_none = torch.tensor([x.grad is None for x in holders], dtype=torch.uint8)
        with lost_in_one_line():
            self._dist.all_reduce(has_none, op=self._dist.ReduceOp.MIN)
        found = [x for x, lacks in zip(holders, has_none.tolist(), strict=True) if not lacks]
        for x in found:
            if x.grad is None:
                # the values of a flat buffer have no memory of their own
                x.grad = torch.zeros_like(x, memory_format=torch.contiguous_format)
        with lost_in_one_line():
            for together in _fill_buckets([x.grad for x in found if x.grad is not None]):
                self._add(together)

    def _add(self, gradients: list[Tensor]) -> None:
        if len(gradients) == 1 and gradients[0].is_contiguous():
            self._dist.all_reduce(gradients[0])
            return
        flat = torch.cat([x.flatten() for x in gradients])
        self._dist.all_reduce(flat)
        parts = flat.split([x.numel() for x in gradients])
        torch._foreach_copy_(
            gradients, [part.view(x.shape) for part, x in zip(parts, gradients, strict=True)]
        )

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors the values that they have on rank 0."""
        with lost_in_one_line():
            for x in tensors:
                self._dist.broadcast(x, 0)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on every rank."""
        box = [make() if self.rank == 0 else None]
        with lost_in_one_line():
            self._dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks on rank 0, nothing elsewhere."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with lost_in_one_line():
            self._dist.gather_object(value, found)
        return found or []

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        found: list[Any] = [None] * self.size
        with lost_in_one_line():
            self._dist.all_gather_object(found, value)
        return found

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """What each rank makes, the first of a machine before the others, for which it may help."""
        made = make() if self.local_rank == 0 else None
        self.sum([])
        return made if self.local_rank == 0 else make()

    def ask(self, what: str, *values: Any) -> None:
        """Has the others do something, which rank 0 is about to do with them."""
        if self.rank == 0:
            self.from_first(lambda: (what, values))

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        """What rank 0 asks the others to do."""
        asked: tuple[str, tuple[Any, ...]] = self.from_first(lambda: None)
        return asked


# those that share work; before the number of a stage stands `DEEPSPEED`
STRATEGIES, DEEPSPEED = ("ddp", "fsdp", "deepspeed_stage_1"), "deepspeed_stage_"
# earlier ones have computed wrong gradients in stage 2
DEEPSPEED_VERSION = (0, 19, 8)


def stage_of(name: str) -> int:
    """The stage of DeepSpeed that a strategy is, 0 for others."""
    return int(name[len(DEEPSPEED)]) if name.startswith(DEEPSPEED) else 0


def require_strategy(name: str, count: int) -> None:
    """Raises ConfigError if so many devices cannot share work by the strategy of this name."""
    if count == 1:
        return
    if name == "single":
        raise ConfigError(
            f"--strategy single is for one device, and there are {count} devices: use one of "
            f"{', '.join(STRATEGIES)}, or --devices 1"
        )
    if name.startswith(DEEPSPEED):
        _require_deepspeed(name)


def _require_deepspeed(name: str) -> None:
    found = ""
    with suppress(PackageNotFoundError):
        found = version("deepspeed")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < DEEPSPEED_VERSION:
        raise ConfigError(
            f"--strategy {name} needs DeepSpeed {'.'.join(map(str, DEEPSPEED_VERSION))} or later, "
            f"and {found or 'none'} is installed: pip install 'rwkv-peft[deepspeed]' (on Linux), "
            "or use --strategy ddp or fsdp"
        )


@contextmanager
def take_part(config: TrainConfig) -> Iterator[Strategy]:
    """This process as one of those that train together, whoever started them, or alone.

    It has the device of its number on its machine, which becomes the current one.

    Raises:
        ConfigError: there are no others where there should be, or fewer devices.
    """
    world = find_world(config)
    if world is None:
        require_alone(config)
        yield Strategy()
        return
    _take_device(config, world)
    watch = _join(config, world)
    strategy, is_whole = Ddp(world), False
    try:
        # blocks may be gathered in the middle of a step
        with lost_in_one_line(works_too=True):
            yield strategy
        is_whole = True
    finally:
        with suppress(RuntimeError):
            if is_whole:
                _leave(watch, world, strategy.endings)
            else:
                # the groups stay: one in which others are missing does not end
                watch.fail("it ended with an error")


def require_alone(config: TrainConfig) -> None:
    """Raises ConfigError if a run needs more processes than this one, which has no others."""
    if config.devices * config.num_nodes > 1:
        raise ConfigError(
            f"--devices {config.devices} --num_nodes {config.num_nodes} need a process each: the "
            "command rwkv-peft train starts those of one machine; a program of your own, and one "
            "on several machines, is started by torchrun or srun, as docs/scaling.md says"
        )


def _take_device(config: TrainConfig, world: World) -> None:
    if ":" in config.accelerator:
        raise ConfigError(
            f"--accelerator {config.accelerator} is one device, and --devices {config.devices} "
            f"needs more: give --accelerator {config.accelerator.partition(':')[0]}, and hide the "
            "others, as with CUDA_VISIBLE_DEVICES"
        )
    require_devices(config, world.local_size)
    if resolve_device(config.accelerator).type != "cpu":
        torch.accelerator.set_device_index(world.local_rank)


def require_devices(config: TrainConfig, count: int) -> None:
    """Raises ConfigError if this machine has fewer devices; a CPU may be any number of them."""
    device = resolve_device(config.accelerator)
    if device.type != "cpu" and (there := torch.accelerator.device_count()) < count:
        raise ConfigError(
            f"--devices {count}: PyTorch finds {there} ({device.type}) on this machine"
        )


def _join(config: TrainConfig, world: World) -> Watch:
    import torch.distributed

    dist: Any = torch.distributed

    def connect(*, is_first: bool = False) -> Any:
        host = is_first and world.rank == 0 and not world.is_held
        store = dist.TCPStore(
            world.address, world.port, is_master=host, wait_for_workers=False, timeout=JOINING
        )
        return dist.PrefixStore(f"rwkv_peft/{world.name}", store)

    kind = resolve_device(config.accelerator).type
    backends = {"cpu": "gloo", kind: dist.get_default_backend_for_device(kind)}
    with lost_in_one_line():
        dist.init_process_group(
            ",".join(f"{device}:{name}" for device, name in backends.items()),
            store=connect(is_first=True),
            rank=world.rank,
            world_size=world.size,
            timeout=WORKING,
        )
        # by which they are connected
        dist.all_reduce(torch.zeros(1))
        return Watch(connect, world.rank, world.size, is_quiet=world.is_own)


def _leave(watch: Watch, world: World, endings: Iterable[Callable[[], None]]) -> None:
    import torch.distributed as dist

    watch.close()
    for end in endings:
        end()
    if dist.is_initialized():
        dist.destroy_process_group()
    if world.rank == 0 and not world.is_held:
        watch.wait_for(range(1, world.size))


@contextmanager
def lost_in_one_line(*, works_too: bool = False) -> Iterator[None]:
    """Makes a LostRankError of what PyTorch says where another rank is gone.

    Args:
        works_too: more goes on than what ranks do together, and may fail by itself.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError) or (works_too and not _is_of_ranks(error)):
            raise
        raise LostRankError(
            "the run has lost a rank, and ends; --resume auto goes on from its last checkpoint "
            f"({str(error).strip().splitlines()[0][:200]})"
        ) from error


def _is_of_ranks(error: RuntimeError) -> bool:
    import torch.distributed

    dist: Any = torch.distributed
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _fill_buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type together while they are small, so that there are few reductions."""
    together: list[Tensor] = []
    size = 0
    for x in gradients:
        if together and (size + x.nbytes > BUCKET or x.dtype != together[0].dtype):
            yield together
            together, size = [], 0
        together.append(x)
        size += x.nbytes
    if together:
        yield together
