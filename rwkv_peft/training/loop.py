"""The training run, from files to files."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import Batch, Batches, load
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.rows import first_documents
from rwkv_peft.data.sources import find_sources
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.device import dtype_of, resolve_device
from rwkv_peft.errors import TrainingError
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import FLAGS, ModelConfig, check_flags
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.selfcheck import require_right
from rwkv_peft.training import plan as planning
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.metrics import Display, RunFolder, StepRecord, peak_memory
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.schedule import learning_rate, weight_decay
from rwkv_peft.training.step import Step, full_step
from rwkv_peft.training.trainee import Saved, States, Trainee, make_trainee


@dataclass(frozen=True, slots=True)
class Result:
    """What a run left behind.

    Attributes:
        proj_dir: its folder.
        weights: the last full or merged model, or state file, None if none was written.
        adapter: the last adapter folder, None where there is no adapter.
        loss: mean cross-entropy of the last epoch's trained tokens, in nats.
        steps: optimizer steps taken.
        signal: number of the signal that ended it early, 0 if none did.
    """

    proj_dir: Path
    weights: Path | None
    adapter: Path | None
    loss: float
    steps: int
    signal: int = 0


@dataclass(slots=True)
class _Run:
    """What the parts of a run share."""

    config: TrainConfig
    model: RWKV
    trainee: Trainee
    optimizer: Optimizer
    batches: Batches
    plan: planning.Plan
    step: Step
    folder: RunFolder
    display: Display


def train(config: TrainConfig, *, step: Step = full_step) -> Result:
    """Trains as configured and writes the run folder.

    Ctrl-C or SIGTERM finish the optimizer step, save what was learned to
    `checkpoints/step-NNN` and return with `Result.signal` set.

    Args:
        step: forward and loss of a micro-batch; a researcher's own may take its place.
    Raises:
        RwkvPeftError: a file, a setting or the data cannot be used, or the loss is not a number.
    """
    config.require_files()
    find_sources(config.data_file, config.data_type)
    weights = read_weights(config.load_model)
    model_config = infer_model_config(weights)
    check_flags(model_config, {name: getattr(config, name) for name in FLAGS}, config.load_model)
    config, choices = planning.choose_model_settings(config)
    documents = read_documents(config, Tokenizer(model_config.vocab_size))
    if config.epoch_unit == "samples":
        documents = first_documents(documents, config.epoch_steps)
    config, more = planning.choose_training_settings(config, model_config, documents)
    batches = planning.make_batches(config, documents)
    plan = planning.make_plan(config, batches)
    config, last = planning.choose_warmup(config, plan.steps)

    torch.manual_seed(config.random_seed)
    model, num_weights = _load_model(config, model_config, weights), _count(weights)
    checked = require_right(
        model.op,
        _request(config, model_config),
        packed=config.dataload == "pack",
        heads=(config.micro_bsz or 1) * model_config.n_head,
    )
    names = set() if documents.states is None else set(documents.states.tolist())
    trainee = make_trainee(config, model, weights, names, plan.steps)
    del weights
    optimizer = _make_optimizer(config, trainee)
    optimizer.load(trainee.values)
    num_trained = _count(trainee.parameters)
    lines = [
        *planning.describe_model(config, model_config, model.op.name, num_weights, num_trained),
        f"op: {model.op.name} ({model.op.reason})",
        *([checked] if checked else []),
        *(f"chosen: {c.name} = {c.value} ({c.reason})" for c in choices + more + last),
        *planning.describe_plan(config, plan, batches),
    ]
    with RunFolder(config.proj_dir) as folder, Display(plan.steps) as display:
        folder.write_config(config)
        for line in lines:
            display.line(line)
            folder.log(line)
        run = _Run(config, model, trainee, optimizer, batches, plan, step, folder, display)
        return _run_epochs(run)


def _load_model(
    config: TrainConfig, model_config: ModelConfig, weights: Mapping[str, Tensor]
) -> RWKV:
    request = _request(config, model_config)
    device, dtype = request.device, request.dtype
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    model = build(model_config, op=config.op, device=device, dtype=dtype)
    load_weights(model, weights, device=device, dtype=dtype)
    model.grad_cp = bool(config.grad_cp)
    return model


def _request(config: TrainConfig, model_config: ModelConfig) -> Request:
    device, dtype = resolve_device(config.accelerator), dtype_of(config.precision)
    return Request(device, dtype, model_config.head_size)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.numel() for x in tensors.values())


def _make_optimizer(config: TrainConfig, trainee: Trainee) -> Optimizer:
    return Optimizer(
        trainee.parameters,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        grad_clip=config.grad_clip,
        plain=trainee.plain,
        raises_rates=bool(config.layerwise_lr),
        decays_adapter=bool(config.adapter_decay),
        uses_loss_scale=dtype_of(config.precision) == torch.float16,
        # several states are to be what each is alone
        clip_groups={n: n.partition("/")[0] for n in trainee.parameters}
        if isinstance(trainee, States)
        else None,
    )


def _run_epochs(run: _Run) -> Result:
    config, position, done = run.config, 0, 0
    assert config.epoch_count is not None
    result = Result(run.folder.path, None, None, math.nan, 0)
    run.model.train()
    with Interrupt() as interrupt:
        end = run.plan.micro_batches * config.epoch_count
        batches = load(run.batches, range(end), config.num_workers)
        for epoch in range(config.epoch_count):
            end = position + run.plan.micro_batches
            loss_sum, weight = 0.0, 0.0
            while position < end:
                stop = min(position + config.accumulate_grad_batches, end)
                micro_batches = list(islice(batches, stop - position))
                record = _optimizer_step(run, micro_batches, done, epoch)
                position, done = stop, done + 1
                of_step = sum(batch.weight for batch in micro_batches)
                loss_sum, weight = loss_sum + record.loss * of_step, weight + of_step
                run.folder.record(record)
                run.display.update(record)
                if interrupt.signal:
                    return _save_interrupted(run, done, loss_sum / weight, interrupt.signal)
            loss = loss_sum / (weight or 1.0)
            number = config.epoch_begin + epoch
            line = f"epoch {number}: loss {loss:.4f}"
            is_last = epoch == config.epoch_count - 1
            if is_last or (epoch + 1) % config.epoch_save == 0:
                saved = run.trainee.save(run.folder.path / f"rwkv-{number}", run.optimizer.values)
                result = Result(run.folder.path, saved.weights, saved.adapter, loss, done)
                line += ", saved " + _files_of(saved)
            _say(run, line)
    return result


def _optimizer_step(run: _Run, micro_batches: list[Batch], done: int, epoch: int) -> StepRecord:
    config, started = run.config, time.perf_counter()
    assert config.lr_init is not None and config.lr_final is not None
    assert config.warmup_steps is not None
    # counted first, so that a token weighs the same however the step is split; a step of windows
    # that are all masked has nothing to divide
    weight = sum(batch.weight for batch in micro_batches) or 1.0
    loss_sum = 0.0
    for batch in micro_batches:
        try:
            state = run.trainee.state(batch)
            output = run.step(run.model, batch, state=state, l2wrap=config.l2wrap)
            value = output.loss_sum.item()
            if not math.isfinite(value):
                raise _not_finite(f"the loss is {value}", done, batch.lines, config)
            run.optimizer.backward(output.objective_sum / weight)
        except torch.OutOfMemoryError as error:
            rows, width = batch.tokens.shape
            raise TrainingError(
                f"out of memory at step {done + 1}, with {rows} rows of {width} tokens: use "
                "--grad_cp 1, or a smaller --micro_bsz (with a larger --accumulate_grad_batches) "
                "or --ctx_len"
            ) from error
        loss_sum += value
    lr = learning_rate(
        done,
        total=run.plan.steps,
        schedule=config.lr_schedule,
        lr_init=config.lr_init,
        lr_final=config.lr_final,
        warmup_steps=config.warmup_steps,
    )
    decay = weight_decay(
        done, total=run.plan.steps, first=config.weight_decay, last=config.weight_decay_final
    )
    if (penalty := run.trainee.penalty()) is not None:
        run.optimizer.backward(penalty)
    grad_norm = run.optimizer.step(
        lr, decay, before_step=run.trainee.before_step, after_step=run.trainee.after_step
    )
    if not math.isfinite(grad_norm) and not run.optimizer.uses_loss_scale:
        lines = [line for batch in micro_batches for line in batch.lines]
        raise _not_finite(f"the gradient is {grad_norm}", done, lines, config)
    seconds = time.perf_counter() - started
    num_tokens = sum(batch.num_tokens for batch in micro_batches)
    return StepRecord(
        step=done + 1,
        epoch=config.epoch_begin + epoch,
        loss=loss_sum / weight,
        lr=lr,
        grad_norm=grad_norm,
        tokens=num_tokens,
        trained_tokens=sum(batch.num_trained for batch in micro_batches),
        t_cost=seconds,
        kt_s=num_tokens / seconds / 1000,
        peak_memory=peak_memory(run.model.emb.weight.device),
    )


def _not_finite(what: str, done: int, lines: list[int], config: TrainConfig) -> TrainingError:
    return TrainingError(
        f"{what} at step {done + 1}, in the rows from lines {', '.join(map(str, lines))} of "
        f"{config.data_file}: nothing of this step was learned. Try a lower --lr_init, or "
        "--precision bf16 in place of fp16"
    )


def _files_of(saved: Saved) -> str:
    return "; ".join(
        (" and ".join(str(p) for p in (saved.weights, saved.adapter) if p), *saved.remarks)
    )


def _say(run: _Run, line: str) -> None:
    run.display.line(line)
    run.folder.log(line)


def _save_interrupted(run: _Run, done: int, loss: float, signal: int) -> Result:
    folder = run.folder.path / "checkpoints" / f"step-{done:06d}"
    saved = run.trainee.save(folder / "rwkv", run.optimizer.values)
    _say(run, f"stopped by signal {signal} after step {done}, saved {_files_of(saved)}")
    return Result(run.folder.path, saved.weights, saved.adapter, loss, done, signal)
