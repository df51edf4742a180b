"""What the ranks beside the first do: their share of each step, and between steps what it asks for.

Rank 0 alone has a folder, a display and the functions after a step. What they need of all ranks it
asks for by name: `state`, that of a checkpoint; `evaluate`, with the step and the epoch; `whole`,
that a block be gathered; `value`, of a trained tensor by its name; `go on`, with the number of a
signal that ends the run.
"""

from pathlib import Path

from rwkv_peft.config import TrainConfig
from rwkv_peft.parallel.strategy import Ddp
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.loop import run_steps
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.recorder import Result, make_result
from rwkv_peft.training.resume import Start
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.step import Step


def follow(
    config: TrainConfig, step: Step | None, start: Start | None, strategy: Ddp, interrupt: Interrupt
) -> Result:
    """Takes part in a run that rank 0 leads, until it ends; see `train`."""
    run, _ = prepare_run(config, step=step, start=start, strategy=strategy)
    interrupt.defer()
    serve(run)
    run_steps(run, (serve,))
    return make_result(run, Path(run.settings.proj_dir), None)


def go_on(run: Run, record: StepRecord | None = None) -> None:
    """Has the other ranks go on to the next step, or end as this one does."""
    run.strategy.ask("go on", run.stopped_by)


def serve(run: Run, record: StepRecord | None = None) -> None:
    """Does what rank 0 asks for until the run goes on."""
    assert isinstance(run.strategy, Ddp)
    while True:
        what, values = run.strategy.hear()
        if what == "go on":
            (run.stopped_by,) = values
            return
        if what == "state":
            run.give_parts()
        elif what == "value":
            run.optimizer.values[values[0]]
        elif what == "whole":
            with run.strategy.whole(run.model, *values):
                pass
        elif what == "evaluate" and run.validation:
            run.evaluate(*values)
