"""The training run, from files to files."""

from dataclasses import dataclass
from pathlib import Path

from rwkv_peft.config import TrainConfig
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.loop import run_steps
from rwkv_peft.training.metrics import Display, RunFolder
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.recorder import Recorder
from rwkv_peft.training.step import Step, full_step


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


def train(config: TrainConfig, *, step: Step = full_step) -> Result:
    """Trains as configured and writes the run folder.

    Ctrl-C or SIGTERM finish the optimizer step, save what was learned to
    `checkpoints/step-NNN` and return with `Result.signal` set.

    Args:
        step: forward, loss and backward of a micro-batch; a researcher's own may take its place.
    Raises:
        RwkvPeftError: a file, a setting or the data cannot be used, or the loss is not a number.
    """
    run, lines = prepare_run(config, step=step)
    settings, goes_on = run.settings, run.progress.step > 0
    with (
        RunFolder(settings.proj_dir, appends=goes_on) as folder,
        Display(run.plan.steps) as display,
        Interrupt() as interrupt,
    ):
        recorder = Recorder(folder, display, interrupt)
        folder.write_config(settings)
        for line in lines:
            recorder.say(line)
        run_steps(run, (recorder.log, recorder.save_stopped, recorder.end_epoch))
    weights, adapter = (run.saved.weights, run.saved.adapter) if run.saved else (None, None)
    return Result(folder.path, weights, adapter, run.saved_loss, run.progress.step, run.stopped_by)
