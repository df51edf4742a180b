"""From a config to a run that is ready for its first step."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from socket import gethostname
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import saved_method
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.pth import infer_model_config, read_weights
from rwkv_peft.checkpoint.records import require_sums
from rwkv_peft.checkpoint.stored import noted_storage
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.documents import first_documents
from rwkv_peft.data.held_out import read_held_out, split_documents
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.sources import find_sources
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.device import free_host_memory, free_memory, resolve_device
from rwkv_peft.errors import ConfigError
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.selfcheck import require_right
from rwkv_peft.parallel.deepspeed import DeepSpeed
from rwkv_peft.parallel.fsdp import Fsdp
from rwkv_peft.parallel.strategy import DEEPSPEED, Ddp, Strategy
from rwkv_peft.quant import STORAGES
from rwkv_peft.training.advice import advise_memory
from rwkv_peft.training.checkpoints import copy_to_host
from rwkv_peft.training.choose import Plan, choose
from rwkv_peft.training.chunk_graphs import GraphedChunks
from rwkv_peft.training.chunks import Chunks
from rwkv_peft.training.describe import (
    describe_chunks,
    describe_model,
    describe_plan,
    describe_space,
    describe_validation,
)
from rwkv_peft.training.folder import DEFAULT_FOLDER, Claim
from rwkv_peft.training.graphs import GraphedStep, draws
from rwkv_peft.training.hosted import HostOptimizer
from rwkv_peft.training.infctx import InfctxStep
from rwkv_peft.training.inputs import mark_file, require_kept_inputs
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.load import load_base, share_trained
from rwkv_peft.training.memory import room_for_borders
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.optimizers import require_package
from rwkv_peft.training.resume import Start
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.settings import Facts, Settings
from rwkv_peft.training.step import Step, full_step
from rwkv_peft.training.target import TrainTarget, make_target, saved_endings
from rwkv_peft.training.validation import make_validation
from rwkv_peft.training.zero import ZeroOptimizer


def prepare_run(
    config: TrainConfig,
    *,
    step: Step | None = None,
    claim: Claim | None = None,
    start: Start | None = None,
    strategy: Strategy | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Run, list[str]]:
    """A run that is ready for its first step, and what a person should read before it.

    Args:
        step: forward, loss and backward of a micro-batch; None: that of the settings.
        claim: of its folder; None if nothing is to be saved.
        start: where it goes on; None if it begins.
        strategy: what it shares with other ranks; None: it is alone.
        tell: called with what is being done next.
    Raises:
        RwkvPeftError: a file, a setting or the data cannot be used.
    """
    tell("checking the files, reading the data")
    require_inputs(config)
    mark, base = mark_file(config.load_model), read_weights(config.load_model)
    strategy, folder = strategy or Strategy(), str(claim.path) if claim else DEFAULT_FOLDER
    facts = strategy.in_turn(partial(find_facts, config, base, folder, strategy.local_size))
    if start:
        start.require_same(base, facts.documents, facts.held_out)
    plan, strategy = choose_together(config, facts, strategy, fingerprint(base))
    settings, names = plan.settings, facts.documents.names
    validation = make_validation(plan, facts, strategy)
    if claim:
        claim.try_names(settings, saved_endings(settings, names))
    torch.manual_seed(settings.random_seed)
    tell(f"loading the model, to {facts.device}")
    model = load_base(settings, facts, base, strategy)
    weights: list[Tensor] = list(model.parameters())
    checked = _require_right(model, settings, facts)
    tell(f"making what is trained ({settings.peft})")
    target = make_target(settings, model, base, mark, names, plan.steps, strategy)
    share_trained(settings, facts, base, strategy, model, target)
    optimizer = make_optimizer(plan, target, strategy, accumulates=step is not None)
    target.begin(optimizer.values)
    begin_together(strategy, target, optimizer, facts.device, settings.random_seed)
    lines = list(_describe(plan, facts, model, checked, target))
    # what is true of both sets of data is told once
    lines += [x for x in describe_validation(settings, facts.held_out) if x not in lines]
    remarks: list[str] = []
    if settings.compile:
        compile_model(model, remarks)
    step = step or make_step(settings, facts, optimizer, remarks, strategy)
    if isinstance(step, InfctxStep):
        lines += describe_chunks(plan, model, step.room)
    if claim:
        lines += describe_space(settings, claim.path, _count(target.parameters))
    parts = plan, model, target, optimizer, step
    run = Run(*parts, remarks=remarks, validation=validation, strategy=strategy)
    if start:
        start.restore(run)
    _share_out(run, weights, tell)
    return run, lines


def _share_out(run: Run, weights: list[Tensor], tell: Callable[[str], None]) -> None:
    if run.strategy.size > 1:
        tell(f"sharing out the work ({run.settings.strategy})")
    run.strategy.shard(run.model, run.model.blocks, weights)


def choose_together(
    config: TrainConfig, facts: Facts, strategy: Strategy, base: str
) -> tuple[Plan, Strategy]:
    """A plan with the choices of rank 0, and the strategy that is one of them.

    Args:
        base: the fingerprint of the model's file.
    Raises:
        ConfigError: this rank reads other files than rank 0.
    """
    if not isinstance(strategy, Ddp):
        return choose(config, facts), strategy
    here = base, len(facts.documents), facts.documents.num_tokens
    if (there := strategy.from_first(lambda: here)) != here:
        differs = config.load_model if here[0] != there[0] else config.data_file
        raise ConfigError(
            f"{differs} on {gethostname()} is another than that of rank 0: give all machines the "
            "same files"
        )
    plan = choose(strategy.from_first(lambda: choose(config, facts).settings), facts)
    name = plan.settings.strategy
    if name == "fsdp":
        return plan, Fsdp(strategy.world, strategy.interrupt)
    if name.startswith(DEEPSPEED):
        return plan, DeepSpeed(strategy, name)
    return plan, strategy


def begin_together(
    strategy: Strategy,
    target: TrainTarget,
    optimizer: Optimizer,
    device: torch.device,
    seed: int,
) -> None:
    """Has ranks begin with what rank 0 begins with, and draw different numbers from now on."""
    if strategy.size == 1:
        return
    # drawn, or made by a decomposition that another device rounds otherwise
    made = {n: optimizer.values[n].clone() for n in optimizer.values if n not in target.plain}
    strategy.spread(made.values())
    optimizer.load(made)
    state = strategy.from_first(lambda: copy_to_host(target.state_dict(), device))
    if strategy.rank:
        target.load_state_dict(state)
    torch.manual_seed(seed + strategy.rank)


def require_inputs(config: TrainConfig) -> None:
    """Raises RwkvPeftError if what a run reads or uses is not there, damaged or written over."""
    config.require_files()
    require_package(config.optimizer)
    find_sources(config.data_file, config.data_type)
    require_kept_inputs(config)
    if config.check_files:
        pissa_init = config.peft_config.get("pissa_init", "")
        require_sums(config.load_model, config.load_adapter, str(pissa_init))


def find_facts(
    config: TrainConfig,
    base: Mapping[str, Tensor],
    free_folder: str = DEFAULT_FOLDER,
    num_processes: int = 1,
) -> Facts:
    """What the choice of settings depends on; reads and tokenises the data.

    Args:
        free_folder: the folder of a run for which none was named.
        num_processes: of the run on this machine, which share the host's memory.
    """
    model_config = infer_model_config(base)
    device = resolve_device(config.accelerator)
    method = saved_method(config.load_adapter) if config.load_adapter else ""
    tokenizer = Tokenizer(model_config.vocab_size)
    documents, held_out = read_documents(config, tokenizer), None
    if config.val_split:
        documents, held_out = split_documents(documents, config.val_split)
    if config.epoch_unit == "samples":
        documents = first_documents(documents, config.epoch_steps)
    memory = free_memory(device)
    if memory is not None and device.type == "cpu":
        memory //= num_processes
    if config.val_file:
        held_out = read_held_out(config, config.val_file, tokenizer, documents)
    return Facts(
        model_config=model_config,
        device=device,
        documents=documents,
        free_folder=free_folder,
        saved_method=method,
        num_weights=_count(base),
        memory=memory,
        held_out=held_out,
    )


def _require_right(model: RWKV, settings: Settings, facts: Facts) -> str | None:
    return require_right(
        model.op,
        Request(facts.device, settings.dtype, facts.model_config.head_size),
        packed=settings.dataload == "pack",
        heads=settings.micro_bsz * facts.model_config.n_head,
    )


def compile_model(model: RWKV, remarks: list[str]) -> None:
    """Has the blocks of a model compiled in the first steps; remarks are made if that fails."""
    if model.grad_cp and draws(model):
        remarks.append(
            "the blocks are not compiled: when backward computes them again, compiled code would "
            "draw other numbers for dropout"
        )
        return
    compile_blocks(
        model,
        on_failure=lambda why: remarks.append(
            f"the blocks cannot be compiled, and run as they are: {why}"
        ),
    )


def make_step(
    settings: Settings,
    facts: Facts,
    optimizer: Optimizer,
    remarks: list[str],
    strategy: Strategy,
) -> Step:
    """The step of a run: whole rows or chunks, as they are or in few shapes that are captured."""

    def fail(why: str) -> None:
        optimizer.forget()
        remarks.append(f"steps cannot be captured as graphs, and run as they are: {why}")

    device, is_captured = facts.device, bool(settings.cuda_graph)
    # the gradients of a state are computed outside of the graph
    if is_captured and settings.peft != "state":
        optimizer.keep_gradients()
    is_plain = not (settings.compile or settings.cuda_graph)
    if settings.is_infctx:
        group = None if settings.bptt_chunks == "all" else settings.bptt_chunks
        way = Chunks()
        if not is_plain:
            way = GraphedChunks(
                device, settings.chunk_ctx, is_captured=is_captured, on_failure=fail
            )
        room = room_for_borders(device, facts.memory, free_host_memory())
        return InfctxStep(settings.chunk_ctx, group, room=room, way=way, strategy=strategy)
    if is_plain:
        return full_step
    return GraphedStep(device, settings.ctx_len, is_captured=is_captured, on_failure=fail)


def make_optimizer(
    plan: Plan, target: TrainTarget, strategy: Strategy, *, accumulates: bool = False
) -> Optimizer:
    """The optimizer of a run over what it trains, with the values that this begins with.

    Args:
        accumulates: a step may have several backwards, whatever the settings say.
    """
    settings = plan.settings
    accumulates |= plan.window > 1 or settings.is_infctx or target.penalty() is not None
    options: dict[str, Any] = {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.adam_eps,
        "grad_clip": settings.grad_clip,
    }
    grouping = Grouping(
        plain=target.plain,
        raises_rates=bool(settings.layerwise_lr),
        decays_adapter=bool(settings.adapter_decay),
        clip_groups=target.clip_groups or {},
        optimizer=settings.optimizer,
    )
    if isinstance(strategy, DeepSpeed):
        optimizer: Optimizer = ZeroOptimizer(strategy, target.parameters, grouping, **options)
    else:
        optimizer = (HostOptimizer if settings.optimizer_cpu else Optimizer)(
            target.parameters,
            grouping,
            **options,
            uses_loss_scale=settings.dtype == torch.float16,
            accumulates=accumulates,
            strategy=strategy,
        )
    optimizer.load(target.initial_values)
    return optimizer


def _describe(
    plan: Plan, facts: Facts, model: RWKV, checked: str | None, target: TrainTarget
) -> Iterator[str]:
    op = model.op
    counts = facts.num_weights, _count(target.parameters)
    yield from describe_model(plan.settings, facts.model_config, op.name, *counts)
    if advice := advise_memory(plan.settings, facts, op.name, *counts):
        yield advice
    layers = [x for x in model.modules() if isinstance(x, FrozenLinear) and x.storage]
    if layers:
        shapes = [(x.out_features, x.in_features) for x in layers]
        stored, dense = (
            sum(STORAGES[plan.settings.quant].count_bytes(*shape) for shape in shapes),
            sum(math.prod(shape) * plan.settings.dtype.itemsize for shape in shapes),
        )
        yield (
            f"quant: {len(layers)} projections are stored as {plan.settings.quant} in "
            f"{stored / 2**20:,.0f} MiB, which would be {dense / 2**20:,.0f} as "
            f"{plan.settings.precision}"
        )
    yield from _say_other_storage(plan.settings)
    yield f"op: {op.name} ({op.reason})"
    if checked:
        yield checked
    yield from describe_plan(plan)


def _say_other_storage(settings: Settings) -> Iterator[str]:
    """Where a tune goes on with weights that are stored otherwise than those it learned on."""
    if not settings.load_adapter:
        return
    before = noted_storage(settings.load_adapter)
    names = before.name if before else "none", settings.quant
    if names[0] != names[1]:
        yield (
            f"quant: {settings.load_adapter} was trained with --quant {names[0]}, and goes on with "
            f"{names[1]}: its loss begins otherwise than it ended"
        )


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.numel() for x in tensors.values())
