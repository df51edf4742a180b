"""The training run, from files to files."""

from dataclasses import dataclass
from pathlib import Path

from rwkv_peft.config import TrainConfig
from rwkv_peft.device import own_stream, resolve_device
from rwkv_peft.errors import CheckpointError
from rwkv_peft.terminal import keep_going
from rwkv_peft.training.folder import take_folder
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.loop import run_steps
from rwkv_peft.training.metrics import Display, RunFolder
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.recorder import Recorder
from rwkv_peft.training.step import Step


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


def train(config: TrainConfig, *, step: Step | None = None) -> Result:
    """Trains as configured and writes the run folder.

    Ctrl-C, SIGTERM or SIGHUP finish the optimizer step, save what was learned to
    `checkpoints/step-NNN` and return with `Result.signal` set. Before the first step there is
    nothing to save, and they raise. A stdout or stderr that breaks changes nothing.

    Args:
        step: forward, loss and backward of a micro-batch, in place of that of the settings.
    Raises:
        RwkvPeftError: a file, a setting, the folder or the data cannot be used, or the loss is not
            a number.
        Stopped: a signal came before the first step; it is a KeyboardInterrupt.
    """
    config.require_files()
    # its template too, which an earlier run may have left in the folder
    inputs = find_inputs(config)
    with (
        keep_going(),
        own_stream(resolve_device(config.accelerator)),
        Interrupt() as interrupt,
        take_folder(config.proj_dir, overwrite=bool(config.overwrite), inputs=inputs) as claim,
    ):
        run, lines = prepare_run(config, step=step, claim=claim)
        with (
            RunFolder(claim.path, appends=run.progress.step > 0) as folder,
            Display(run.plan.steps) as display,
        ):
            recorder = Recorder(claim, folder, display, interrupt)
            recorder.introduce(run, lines)
            interrupt.defer()
            if run.is_done:
                recorder.save_start(run)
            run_steps(run, (recorder.log, recorder.save_stopped, recorder.end_epoch))
    if run.saved and run.saved.failure and not run.stopped_by:
        raise CheckpointError(run.saved.failure)
    weights, adapter = (run.saved.weights, run.saved.adapter) if run.saved else (None, None)
    return Result(folder.path, weights, adapter, run.saved_loss, run.progress.step, run.stopped_by)
