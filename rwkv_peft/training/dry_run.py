"""A run without its training: all that is chosen, what it takes, and three steps that are lost."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain

import torch

from rwkv_peft.config import TrainConfig
from rwkv_peft.device import free_memory, own_stream, resolve_device
from rwkv_peft.parallel.strategy import take_part
from rwkv_peft.parallel.world import find_world, fit_config
from rwkv_peft.printing import counted, duration
from rwkv_peft.terminal import keep_going
from rwkv_peft.training.display import Display
from rwkv_peft.training.folder import take_folder
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.loop import run_steps
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.reporter import find_loggers
from rwkv_peft.training.resume import find_start
from rwkv_peft.training.run_state import Run

STEPS = 3
# what a process on a GPU takes beside its tensors
BESIDE = 1 << 29


def dry_run(config: TrainConfig, say: Callable[[str], None]) -> Run:
    """Makes a run ready as training does, says the same, and takes three steps; saves nothing.

    Raises:
        RwkvPeftError: as `train` does.
    """
    config = fit_config(config, find_world(config))
    start = find_start(config)
    config = start.config if start else config
    find_loggers(config)
    options = {"overwrite": bool(config.overwrite), "inputs": find_inputs(config)}
    with (
        keep_going(),
        Interrupt(),
        take_part(config) as strategy,
        own_stream(device := resolve_device(config.accelerator)),
        Display() as display,
        ExitStack() as stack,
    ):
        free = free_memory(device)
        claim = None
        if strategy.rank == 0:
            folder = take_folder(config.proj_dir, goes_on=start is not None, **options)  # type: ignore[arg-type]
            claim = stack.enter_context(folder)
        tell = display.tell if strategy.rank == 0 else (lambda _: None)
        say = say if strategy.rank == 0 else (lambda _: None)
        run, lines = prepare_run(config, claim=claim, start=start, strategy=strategy, tell=tell)
        for line in chain(lines, start.lines if start else ()):
            say(line)
        records: list[StepRecord] = []

        def note(run: Run, record: StepRecord) -> None:
            records.append(record)
            # as a signal would, so that no more steps are taken
            run.stopped_by = int(len(records) == STEPS)

        tell(f"taking {counted(STEPS, 'trial step')}")
        run_steps(run, (note,))
        say(_describe_memory(device, free, records))
        say(_describe_time(run, records))
        say("dry run: nothing was trained and nothing was written")
    return run


def _describe_memory(device: torch.device, free: int | None, records: list[StepRecord]) -> str:
    there = "" if free is None else f", {free / 2**30:.1f} GiB of {device} were free before"
    peak = records[-1].peak_memory if records else 0
    if not peak:
        return f"memory: see the guess above{there}"
    if device.type != "cpu":
        peak += BESIDE
    line = f"memory: the trial steps took {peak / 2**30:.1f} GiB{there}"
    if free is not None and peak > 0.9 * free:
        line += ": little is left for longer rows: --grad_cp 1 or a smaller --micro_bsz takes less"
    return line


def _describe_time(run: Run, records: list[StepRecord]) -> str:
    """The time of all steps, of which the first compiles and warms up."""
    steps = run.plan.steps - (run.progress.step - len(records))
    if not records:
        return "time: there is no step to take"
    step = sum(x.t_cost for x in records[1:]) / (len(records) - 1 or 1) or records[0].t_cost
    total = records[0].t_cost + step * (steps - 1)
    return (
        f"time: about {duration(total)} for {counted(steps, 'step')} of {step:.3g} s, by "
        f"{counted(len(records), 'trial step')}; evaluating and saving come on top"
    )
