"""The training loop: optimizer steps, and what happens after each."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from rwkv_peft.data.batching import Batch, load, share
from rwkv_peft.training.checks import lack_in_one_line, require_finite_step, require_gradient
from rwkv_peft.training.choose import Plan
from rwkv_peft.training.metrics import StepRecord, peak_memory
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.schedule import rates

AfterStep = Callable[[Run, StepRecord], None]


def run_steps(run: Run, after_step: Iterable[AfterStep]) -> None:
    """Takes optimizer steps until all are taken, or one of `after_step` stops the run.

    After each step every function of `after_step` is called in turn.
    """
    run.model.train()
    rank, size, position = run.strategy.rank, run.strategy.size, run.progress.position
    turns = (turn for window in _windows(run.plan, position) for turn in share(window, rank, size))
    batches = load(run.plan.batches, turns, run.settings.num_workers)
    for window in _windows(run.plan, position):
        if run.is_done or run.stopped_by:
            return
        record = take_step(run, islice(batches, -(-len(window) // size)), window)
        for action in after_step:
            action(run, record)


def _windows(plan: Plan, position: int) -> Iterator[range]:
    """The positions of each optimizer step from one on, none of them over the end of an epoch."""
    while position < plan.micro_batches * plan.settings.epoch_count:
        left = plan.micro_batches - position % plan.micro_batches
        yield range(position, position + min(plan.window, left))
        position += min(plan.window, left)


def take_step(run: Run, batches: Iterator[Batch], window: range) -> StepRecord:
    """Takes one optimizer step over micro-batches, and moves the progress on.

    Args:
        batches: those that this rank takes.
        window: positions of those of all ranks.
    Raises:
        TrainingError: the loss or the gradient is not finite, or memory is out; the weights are as
            they were.
    """
    settings, progress, started = run.settings, run.progress, time.perf_counter()
    strategy, after_step = run.strategy, run.target.after_step
    micro_batches = list(batches)
    epoch = settings.epoch_begin + run.epoch
    # counted first, so that a token weighs the same however the step is split; windows that are
    # all masked count nothing
    counts = [(batch.weight, batch.num_tokens, batch.num_trained) for batch in micro_batches]
    weight, num_tokens, num_trained = strategy.sum([sum(x) for x in zip(*counts, strict=True)])
    sums = [_step(run, batch, weight or 1.0) for batch in micro_batches]
    if (penalty := run.target.penalty()) is not None:
        run.optimizer.backward(penalty / strategy.size)
    strategy.reduce(run.optimizer.holders)
    lr, decay = rates(settings, progress.step, run.plan.steps)
    norms = run.optimizer.clip(
        lambda: run.target.before_clipping(micro_batches, strategy.sum), (lr, decay)
    )
    results = torch.cat((strategy.gather(torch.stack(sums).to(norms), len(window)), norms))
    # a device that can skip a step by itself goes on while the host waits for the results
    is_ahead = progress.step > 0 and run.optimizer.can_skip
    if is_ahead:
        run.optimizer.step(lr, decay, is_finite=results.isfinite().all(), after=after_step)
    losses, grad_norm = _read(results, len(window))
    require_finite_step(run.plan.batches, window, losses, grad_norm, progress.step + 1, settings)
    if progress.step == 0 and weight and grad_norm == 0:
        require_gradient(run.target.parameters)
    if not is_ahead:
        run.optimizer.step(lr, decay, is_finite=math.isfinite(grad_norm), after=after_step)

    if progress.position % run.plan.micro_batches == 0:
        progress.begin_epoch()
    loss = sum(losses) / (weight or 1.0)
    progress.take(len(window), int(num_tokens), loss, weight)
    seconds = time.perf_counter() - started
    return StepRecord(
        step=progress.step,
        epoch=epoch,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens=int(num_tokens),
        trained_tokens=int(num_trained),
        t_cost=seconds,
        kt_s=num_tokens / seconds / 1000,
        peak_memory=peak_memory(run.device),
    )


def _step(run: Run, batch: Batch, divisor: float) -> Tensor:
    """Forward, loss and backward of one micro-batch; gives its summed loss."""
    with lack_in_one_line(batch, run.progress.step + 1, run.settings):
        output = run.step(
            run.model,
            batch,
            state=run.target.initial_state(batch),
            divisor=divisor,
            l2wrap=run.settings.l2wrap,
            backward=run.optimizer.backward,
        )
    return output.loss_sum


def _read(results: Tensor, count: int) -> tuple[list[float], float]:
    """The losses and the gradient's norm on the host: the one wait for the device in a step."""
    values = results.tolist()
    return values[:count], math.hypot(*values[count:])
