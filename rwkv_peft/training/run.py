"""The training run, from files to files."""

from rwkv_peft.config import TrainConfig
from rwkv_peft.device import own_stream, resolve_device
from rwkv_peft.parallel.strategy import Ddp, Strategy, take_part
from rwkv_peft.parallel.world import find_world, fit_config
from rwkv_peft.terminal import keep_going
from rwkv_peft.training.answers import Answers
from rwkv_peft.training.aside import Aside
from rwkv_peft.training.checkpoints import Checkpoints
from rwkv_peft.training.display import Display
from rwkv_peft.training.folder import take_folder
from rwkv_peft.training.follow import follow, go_on
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.loop import run_steps
from rwkv_peft.training.metrics import RunFolder
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.recorder import Recorder, Result, make_result
from rwkv_peft.training.reporter import Reporter, find_loggers
from rwkv_peft.training.resume import Start, find_start
from rwkv_peft.training.step import Step
from rwkv_peft.training.validator import Validator


def train(
    config: TrainConfig, *, step: Step | None = None, answers: Answers | None = None
) -> Result:
    """Trains as configured and writes the run folder.

    Ctrl-C, SIGTERM or SIGHUP finish the optimizer step, write a checkpoint and what was learned to
    `checkpoints/step-NNN` and return with `Result.signal` set; a second Ctrl-C ends at once. Before
    the first step there is nothing to save, and they raise. A stdout or stderr that breaks changes
    nothing.

    Args:
        step: forward, loss and backward of a micro-batch, in place of that of the settings.
        answers: takes what the model answers before and after.
    Raises:
        RwkvPeftError: a file, a setting, the folder or the data cannot be used, or the loss is not
            a number.
        Stopped: a signal came before the first step; it is a KeyboardInterrupt.
    """
    config = fit_config(config, find_world(config))
    start = find_start(config)
    config = start.config if start else config
    config.require_files()
    with (
        keep_going(),
        Interrupt() as interrupt,
        take_part(config) as strategy,
        own_stream(resolve_device(config.accelerator)),
    ):
        strategy.interrupt = interrupt
        if isinstance(strategy, Ddp) and strategy.rank:
            return follow(config, step, start, strategy, interrupt)
        return _lead(config, step, answers, start, strategy, interrupt)


def _lead(
    config: TrainConfig,
    step: Step | None,
    answers: Answers | None,
    start: Start | None,
    strategy: Strategy,
    interrupt: Interrupt,
) -> Result:
    """The run of the one process, or of rank 0, which alone writes and speaks."""
    # its template too, which an earlier run may have left in the folder
    inputs = find_inputs(config)
    loggers = find_loggers(config)
    with (
        Display() as display,
        take_folder(
            config.proj_dir,
            overwrite=bool(config.overwrite),
            inputs=inputs,
            goes_on=start is not None,
        ) as claim,
    ):
        run, lines = prepare_run(
            config, step=step, claim=claim, start=start, strategy=strategy, tell=display.tell
        )
        with (
            RunFolder(claim.path, places=start.places if start else None) as folder,
            Checkpoints(run, folder, start.folder if start else None) as checkpoints,
            Aside() as aside,
        ):
            recorder = Recorder(claim, folder, display, interrupt, checkpoints, aside, answers)
            recorder.introduce(run, lines, start.lines if start else ())
            validator = Validator(folder, recorder.say)
            validator.evaluate(run)
            reporter = Reporter(loggers, recorder.say)
            interrupt.defer()
            recorder.meet_end(run)
            go_on(run)
            actions = recorder.log, recorder.end_epoch, recorder.save_checkpoint, recorder.stop
            evaluation = validator.after_step, reporter.after_step
            run_steps(run, (validator.begin, *actions, *evaluation, go_on))
            recorder.finish(run)
            # merges, which is not done beside another merge
            validator.end(run)
            reporter.end(run)
    return make_result(run, folder.path, checkpoints.last, answers)
