"""What trains a model, or all of it, shared out among ranks by DeepSpeed's ZeRO."""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._tensor_str import printoptions

from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.strategy import Ddp, stage_of

# numbers that are reduced or gathered at once
BUCKET = 50_000_000
# what AdamW remembers of each number
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Trained:
    """What DeepSpeed trains, and how.

    Attributes:
        parameters: by name; of one type.
        groups: names of those with the same factor of the rate, and whether they decay.
        make: an AdamW of groups of parameters.
        grad_clip: norm to which the gradients of all are clipped; 0 for none.
    """

    parameters: Mapping[str, nn.Parameter]
    groups: Mapping[tuple[float, bool], Sequence[str]]
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    grad_clip: float


class DeepSpeed(Ddp):
    """Each rank has a part of the float32 values and moments, from stage 2 on of the gradients too.

    The engine has the trained tensors alone, and goes backward from an objective, so that it needs
    to know nothing of the model. In stage 3 it has the blocks too, of which each rank keeps a part;
    what is trained outside of them, such as the head, is whole on each.

    Attributes:
        stage: 1 to 3.
        trained: what is to be trained, which must be set before `shard`.
        after_start: called once DeepSpeed has it.
    """

    def __init__(self, start: Ddp, name: str) -> None:
        """Begins as one of the ranks that have met.

        Args:
            name: of the strategy, with its stage.
        """
        super().__init__(start.world, start.interrupt)
        self.endings = start.endings
        self.stage, self._name = stage_of(name), name
        # in stage 2 ranks reduce in each backward, of which all must have as many
        self.shares_model = self.stage > 1
        self.trained: Trained | None = None
        self.after_start: list[Callable[[], None]] = []
        self._engine: Any = None
        self._outside: list[Any] = []

    @property
    def has_started(self) -> bool:
        """Whether DeepSpeed has what is trained."""
        return self._engine is not None

    @property
    def in_parts(self) -> Collection[str]:
        """Names of what is trained of which each rank has a part alone."""
        return self.trained.parameters.keys() if self.trained and self.has_started else ()

    def reduce(self, holders: Sequence[Tensor]) -> None:
        """Does nothing: DeepSpeed reduces gradients itself."""

    def shard(
        self, model: nn.Module, blocks: Iterable[nn.Module], weights: Iterable[Tensor]
    ) -> None:
        """Has DeepSpeed share out what is trained, and in stage 3 all of the blocks.

        Raises:
            ConfigError: what is trained is of several types, or shared by blocks in stage 3.
        """
        assert self.trained is not None
        trained, blocks = self.trained, list(blocks)
        self._require(trained, blocks)
        first = next(iter(trained.parameters.values()))
        deepspeed = self._import(first.device)
        _take_default_stream(first.device)
        groups = [
            {"params": [trained.parameters[n] for n in names], "scale": scale, "decays": decays}
            for (scale, decays), names in trained.groups.items()
        ]
        inner = {id(x) for block in blocks for x in block.parameters()}
        self._outside = [x for x in trained.parameters.values() if id(x) not in inner]
        if self.stage == 3:
            holder = _Holder(self._outside, blocks)
        else:
            holder = _Holder(trained.parameters.values())
        # it tells of memory, and makes text of every parameter for a line that nobody reads
        with redirect_stdout(StringIO()), printoptions(threshold=0, edgeitems=0):
            self._engine, _, _, _ = deepspeed.initialize(
                model=holder,
                optimizer=trained.make(groups),
                config=self._configure(trained, first),
                dist_init_required=False,
            )
        self.endings.append(self._end)
        for action in self.after_start:
            action()
        if self.stage == 3:
            self._gather_outside()
            self._go_through(model)

    def _require(self, trained: Trained, blocks: Sequence[nn.Module]) -> None:
        types = sorted({str(x.dtype) for x in trained.parameters.values()})
        if len(types) > 1:
            raise ConfigError(
                f"--strategy {self._name} trains tensors of one type, and these are of "
                f"{', '.join(types)}: use --strategy ddp"
            )
        # a block's gradients are reduced when its own backward ends
        counts = Counter(id(x) for block in blocks for x in block.parameters())
        shared = [n for n, x in trained.parameters.items() if counts[id(x)] > 1]
        if self.stage == 3 and shared:
            raise ConfigError(
                f"--strategy {self._name} takes a block at a time, and {shared[0]} is trained in "
                "several: use --strategy ddp, or another --peft"
            )

    def _go_through(self, model: Any) -> None:
        """Has the engine take part in the model's way through the blocks."""
        model.hidden = partial(self._engine, model.hidden)
        # where no input of a block needs a gradient, its backward is told to have ended too early
        model.emb.register_forward_hook(lambda _, __, x: x.requires_grad_(torch.is_grad_enabled()))

    def _gather_outside(self) -> None:
        """Has what is trained outside of blocks be whole until the next step."""
        if self._outside:
            self._outside[0].all_gather(self._outside)

    def _import(self, device: torch.device) -> Any:
        world = self.world
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (world.rank, world.local_rank, world.size, world.address, world.port)
        # or else it asks MPI
        os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
        os.environ["DS_ACCELERATOR"] = device.type
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # of PyTorch, about DeepSpeed's calls
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if device.type == "cpu":
            # a compiler would be run for it, and gloo is there
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
        return deepspeed

    def _configure(self, trained: Trained, first: Tensor) -> dict[str, Any]:
        count = sum(x.numel() for x in trained.parameters.values())
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(count, BUCKET),
            "allgather_bucket_size": BUCKET,
            # a block comes in one piece, so that small tensors in it cost nothing
            "stage3_param_persistence_threshold": 0,
        }
        if self._name.endswith("offload"):
            pinned = first.device.type != "cpu"
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        return {
            "train_micro_batch_size_per_gpu": 1,
            # as many backwards as there are until `step`
            "managed_gradient_accumulation": False,
            "gradient_clipping": trained.grad_clip,
            "bf16": {"enabled": first.dtype == torch.bfloat16, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            # PyTorch's own AdamW on the host needs no compiler
            "zero_force_ds_cpu_optimizer": False,
        }

    def backward(self, objective: Tensor) -> None:
        """Adds the gradient of an objective (); gradients are summed over ranks, not averaged."""
        objective = objective * self.size
        if self.stage > 1:
            # what has no gradient in the first backward of a step would keep that of the last step,
            # and one in which nothing has any, as of a chunk behind the state, would fail
            for x in self._outside:
                objective = objective + 0 * x.sum()
        self._engine.backward(objective if self.stage == 3 else self._engine(objective))

    def step(self, lr: float, weight_decay: float) -> Tensor:
        """Reduces, clips and takes a step, unless the norm is not finite.

        Returns:
            the norm () of the gradients before they were clipped.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            group["weight_decay"] = weight_decay * group["decays"]
        self._engine.step()
        if self.stage == 3:
            self._gather_outside()
        return torch.as_tensor(self._engine.get_global_grad_norm()).float()

    def value(self, name: str, what: str = "") -> Tensor:
        """The whole float32 value of a tensor, which all ranks ask for together.

        Args:
            what: one of `MOMENTS` in its place.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameter(name)
        found: Tensor = (
            safe_get_full_optimizer_state(parameter, what)
            if what
            else safe_get_full_fp32_param(parameter)
        )
        return found

    def set(self, name: str, value: Tensor, what: str = "") -> None:
        """Gives this rank's part of a tensor a value; see `value`."""
        from deepspeed import utils

        parameter = self._parameter(name)
        value, set_value = value.to(parameter.device, torch.float32), utils.safe_set_full_fp32_param
        set_moment = utils.safe_set_full_optimizer_state
        if self.stage == 3:
            # by the whole it fails where the parts are not as large as each other
            value = self._part(parameter, value)
            set_value = utils.safe_set_local_fp32_param
            set_moment = utils.safe_set_local_optimizer_state
        if what:
            set_moment(parameter, value, what)
        else:
            set_value(parameter, value)

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part (n,) of a whole value, with zeros behind its end."""
        size, rank = parameter.ds_tensor.numel(), self.rank
        part = value.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(part, (0, size - len(part)))

    @property
    def steps(self) -> Tensor:
        """Steps () that AdamW has taken."""
        found: Tensor = self._adamw.state[self._flat_parts()[0]]["step"]
        return found

    def begin_moments(self, steps: float = 0.0) -> None:
        """Makes moments of zero, after so many steps, which `set` may change."""
        for x in self._flat_parts():
            moments = {name: torch.zeros_like(x) for name in MOMENTS}
            self._adamw.state[x] = {"step": torch.tensor(steps, device=x.device), **moments}
        # it would link those of the first group alone, after that has been stepped
        if self.stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return found

    def _flat_parts(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [x for group in self._adamw.param_groups for x in group["params"]]

    def _parameter(self, name: str) -> nn.Parameter:
        assert self.trained is not None
        return self.trained.parameters[name]

    def settle(self, model: nn.Module) -> None:
        """Gives up blocks that are still whole: of an answer they cannot be trained."""
        if self.stage == 3:
            self._engine.empty_partition_cache()
            self._gather_outside()

    @contextmanager
    def whole(self, model: nn.Module, path: str) -> Iterator[None]:
        """Has a block be whole on this rank, which every rank must ask for."""
        if self.stage < 3 or not path:
            yield
            return
        import deepspeed

        self.ask("whole", path)
        block = model.get_submodule(path)
        with deepspeed.zero.GatheredParameters(list(block.parameters())):
            yield

    def _end(self) -> None:
        import deepspeed

        self._engine.destroy()
        self._engine = None
        deepspeed.comm.destroy_process_group()


class _Holder(nn.Module):
    """What an engine has: trained tensors, and blocks in stage 3.

    It hands on an objective as it is, or calls the way through the blocks.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], blocks: Iterable[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.trained, self.blocks = nn.ParameterList(parameters), nn.ModuleList(blocks)
        for block in self.blocks:
            _set_leaf(block)

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        return x(*args, **options) if callable(x) else x


def _take_default_stream(device: torch.device) -> None:
    """Has all work be on the stream on which DeepSpeed's own is, as nothing is captured."""
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "default_stream"):
        stream = module.default_stream(device)
        stream.wait_stream(module.current_stream(device))
        module.set_stream(stream)


def _set_leaf(block: nn.Module) -> None:
    """Has DeepSpeed gather a block whole: its functions read weights of its inner modules."""
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(block, True)
