"""The training loop: optimizer steps, and what happens after each."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.data.batching import Batch, load
from rwkv_peft.errors import TrainingError
from rwkv_peft.models.base import RWKV
from rwkv_peft.training.checks import require_finite_step, require_gradient
from rwkv_peft.training.choose import Plan
from rwkv_peft.training.metrics import StepRecord, peak_memory
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.progress import Progress, RandomGenerators
from rwkv_peft.training.saved import Saved
from rwkv_peft.training.schedule import rates
from rwkv_peft.training.settings import Settings
from rwkv_peft.training.step import Step
from rwkv_peft.training.target import TrainTarget
from rwkv_peft.training.validation import Validation


@dataclass(slots=True)
class Run:
    """A run that can be taken up where it is: everything that one step changes hangs here.

    Attributes:
        saved: files of the last save, None before the first.
        saved_loss: mean loss of the epoch, or the part of one, that they end.
        saved_step: optimizer steps that had been taken then.
        stopped_by: number of the signal that ends it after this step, 0 if none does.
        remarks: what came up during a step, to be told to the user after it.
        validation: what is evaluated while it goes on, None if nothing is.
        best: files of the best evaluation, None before the end.
    """

    plan: Plan
    model: RWKV
    target: TrainTarget
    optimizer: Optimizer
    step: Step
    progress: Progress = field(default_factory=Progress)
    saved: Saved | None = None
    saved_loss: float = math.nan
    saved_step: int = 0
    stopped_by: int = 0
    remarks: list[str] = field(default_factory=list)
    validation: Validation | None = None
    best: Saved | None = None

    @property
    def settings(self) -> Settings:
        """What it does."""
        return self.plan.settings

    @property
    def device(self) -> torch.device:
        """Where its model is."""
        device: torch.device = self.model.emb.weight.device
        return device

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or more would not make it better."""
        is_enough = self.validation is not None and self.validation.is_enough
        return is_enough or self.progress.step >= self.plan.steps

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.progress.position // self.plan.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """All that must be kept to go on as if the run had never stopped.

        The learning rate follows from the step, and the order of the data from the seed.
        """
        return {
            "progress": self.progress.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": RandomGenerators(self.device).state_dict(),
            "validation": self.validation.state_dict() if self.validation else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` of a run with the same settings gave."""
        self.progress.load_state_dict(state["progress"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        RandomGenerators(self.device).load_state_dict(state["random"])
        if self.validation:
            self.validation.load_state_dict(state["validation"])


AfterStep = Callable[[Run, StepRecord], None]


def run_steps(run: Run, after_step: Iterable[AfterStep]) -> None:
    """Takes optimizer steps until all are taken, or one of `after_step` stops the run.

    After each step every function of `after_step` is called in turn. A step never reaches over the
    end of an epoch, so the last one of an epoch may have fewer micro-batches.
    """
    run.model.train()
    micro_batches, position = run.plan.micro_batches, run.progress.position
    end = micro_batches * run.settings.epoch_count
    batches = load(run.plan.batches, range(position, end), run.settings.num_workers)
    while not run.is_done and not run.stopped_by:
        left = micro_batches - run.progress.position % micro_batches
        count = min(run.settings.accumulate_grad_batches, left)
        record = take_step(run, islice(batches, count))
        for action in after_step:
            action(run, record)


def take_step(run: Run, batches: Iterator[Batch]) -> StepRecord:
    """Takes one optimizer step over the micro-batches, and moves the progress on.

    Raises:
        TrainingError: the loss or the gradient is not finite, or memory is out; the weights are as
            they were.
    """
    settings, progress, started = run.settings, run.progress, time.perf_counter()
    after_step = run.target.after_step
    micro_batches = list(batches)
    epoch = settings.epoch_begin + run.epoch
    # counted first, so that a token weighs the same however the step is split; windows that are
    # all masked count nothing
    weight = sum(batch.weight for batch in micro_batches)
    sums = [_step(run, batch, weight or 1.0) for batch in micro_batches]
    if (penalty := run.target.penalty()) is not None:
        run.optimizer.backward(penalty)
    lr, decay = rates(settings, progress.step, run.plan.steps)
    norms = run.optimizer.clip(lambda: run.target.before_clipping(micro_batches))
    results = torch.cat((torch.stack(sums).to(norms), norms))
    # a device that can skip a step by itself goes on while the host waits for the results
    is_ahead = progress.step > 0 and run.optimizer.can_skip
    if is_ahead:
        run.optimizer.step(lr, decay, is_finite=results.isfinite().all(), after=after_step)
    losses, grad_norm = _read(results, len(sums))
    require_finite_step(micro_batches, losses, grad_norm, progress.step + 1, settings)
    if progress.step == 0 and weight and grad_norm == 0:
        require_gradient(run.target.parameters)
    if not is_ahead:
        run.optimizer.step(lr, decay, is_finite=math.isfinite(grad_norm), after=after_step)

    if progress.position % run.plan.micro_batches == 0:
        progress.begin_epoch()
    progress.step += 1
    progress.position += len(micro_batches)
    num_tokens = sum(batch.num_tokens for batch in micro_batches)
    progress.tokens += num_tokens
    loss = sum(losses) / (weight or 1.0)
    progress.loss_sum += loss * weight
    progress.loss_weight += weight
    seconds = time.perf_counter() - started
    return StepRecord(
        step=progress.step,
        epoch=epoch,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens=num_tokens,
        trained_tokens=sum(batch.num_trained for batch in micro_batches),
        t_cost=seconds,
        kt_s=num_tokens / seconds / 1000,
        peak_memory=peak_memory(run.device),
    )


def _step(run: Run, batch: Batch, divisor: float) -> Tensor:
    """Forward, loss and backward of one micro-batch; gives its summed loss."""
    try:
        output = run.step(
            run.model,
            batch,
            state=run.target.initial_state(batch),
            divisor=divisor,
            l2wrap=run.settings.l2wrap,
            backward=run.optimizer.backward,
        )
    except torch.OutOfMemoryError as error:
        rows, width = batch.tokens.shape
        raise TrainingError(
            f"out of memory at step {run.progress.step + 1}, with {rows} rows of {width} tokens: "
            "use --grad_cp 1, or a smaller --micro_bsz (with a larger --accumulate_grad_batches) "
            f"or --{'chunk_ctx' if run.settings.is_infctx else 'ctx_len'}"
        ) from error
    return output.loss_sum


def _read(results: Tensor, count: int) -> tuple[list[float], float]:
    """The losses and the gradient's norm on the host: the one wait for the device in a step."""
    values = results.tolist()
    return values[:count], math.hypot(*values[count:])
