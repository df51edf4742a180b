"""What happens after a step: logging, showing, saving; and what that leaves behind."""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.answers import Answers
from rwkv_peft.training.aside import Aside, Finished
from rwkv_peft.training.checkpoints import Checkpoints, folder_name
from rwkv_peft.training.describe import describe_end
from rwkv_peft.training.display import Display
from rwkv_peft.training.folder import Claim
from rwkv_peft.training.infctx import InfctxStep
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.metrics import RunFolder, StepRecord
from rwkv_peft.training.progress import RandomGenerators
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.saved import Saved
from rwkv_peft.training.settings import Settings
from rwkv_peft.training.validation import Evaluation


@dataclass(frozen=True, slots=True)
class Result:
    """What a run left behind.

    Attributes:
        proj_dir: its folder.
        weights: the last full or merged model, or state file, None if none was written.
        adapter: the last adapter folder, None where there is no adapter.
        loss: mean cross-entropy of the last epoch's trained tokens, in nats.
        steps: optimizer steps taken, those before it was resumed too.
        signal: number of the signal that ended it early, 0 if none did.
        checkpoint: the newest, from which `TrainConfig.resume` goes on; None if there is none.
        evaluations: made while it trained, in their order.
        best: files of the best of them; None if there was none, or a signal ended the run.
        answers: to the first question of the data; None if it was not asked.
        settings: all of them, as they were chosen.
    """

    proj_dir: Path
    weights: Path | None
    adapter: Path | None
    loss: float
    steps: int
    signal: int = 0
    checkpoint: Path | None = None
    evaluations: tuple[Evaluation, ...] = ()
    best: Saved | None = None
    answers: Answers | None = None
    settings: Settings | None = None


def make_result(
    run: Run, proj_dir: Path, checkpoint: Path | None, answers: Answers | None = None
) -> Result:
    """The result of a run that has ended.

    Raises:
        CheckpointError: a file is not there that should be, as its base was changed.
    """
    for saved in (run.saved, run.best):
        if saved and saved.failure and not run.stopped_by:
            raise CheckpointError(saved.failure)
    weights, adapter = (run.saved.weights, run.saved.adapter) if run.saved else (None, None)
    return Result(
        proj_dir=proj_dir,
        weights=weights,
        adapter=adapter,
        loss=run.saved_loss,
        steps=run.progress.step,
        signal=run.stopped_by,
        checkpoint=checkpoint,
        evaluations=tuple(run.validation.evaluations) if run.validation else (),
        best=run.best,
        answers=answers,
        settings=run.settings,
    )


class Recorder:
    """Logs, shows and saves after a step; the functions that `run_steps` calls are its methods.

    Nothing is written before the first step is done: a run that cannot take it leaves no trace, and
    an earlier one in its place.
    """

    def __init__(
        self,
        claim: Claim,
        folder: RunFolder,
        display: Display,
        interrupt: Interrupt,
        checkpoints: Checkpoints,
        aside: Aside,
        answers: Answers | None = None,
    ) -> None:
        self._claim, self._folder = claim, folder
        self._checkpoints, self._aside = checkpoints, aside
        self._display, self._interrupt, self._answers = display, interrupt, answers
        self._has_begun = self._has_problem = False
        # a run that goes on leaves later checkpoints until it has taken a step of its own
        self._first_step = checkpoints.step

    def say(self, line: str) -> None:
        """Shows a line to the user and keeps it in the log."""
        self._display.line(line)
        self._folder.log(line)

    def introduce(self, run: Run, lines: Iterable[str], words: Iterable[str] = ()) -> None:
        """Says what a run will do, and from now on shows the chunks of its long rows.

        Args:
            words: of how it goes on; shown alone, as the log is that of one that never stopped.
        """
        for line in lines:
            self.say(line)
        for line in words:
            self._display.line(line)
        self._folder.introduce()
        self._display.begin(run.plan.steps, run.progress.step)
        if self._answers:
            self._display.tell("answering the first question of the data")
            self._answers.ask_before(run)
        evaluation = "evaluating, then " if run.validation else ""
        self._display.tell(f"{evaluation}the first step, in which kernels are built")
        if isinstance(run.step, InfctxStep):
            run.step.after_chunk = self._display.show_chunk

    def log(self, run: Run, record: StepRecord) -> None:
        """Notes every step."""
        self._begin(run)
        self._collect(run, waits=False)
        while run.remarks:
            # the log of a run that goes on is that of one that never stopped
            (self._display.line if self._first_step else self.say)(run.remarks.pop(0))
        self._folder.record(record)
        if self._folder.problem and not self._has_problem:
            self._has_problem = True
            self._display.line(f"{self._folder.problem}: training goes on, the log waits for room")
        self._display.update(record)

    def _begin(self, run: Run) -> None:
        """Clears the folder of what was there, once."""
        if not self._has_begun:
            self._has_begun = True
            self._claim.clear()
            self._checkpoints.discard_later(self._first_step)
            self._folder.write_config(run.settings)
            self._folder.begin()

    def end_epoch(self, run: Run, record: StepRecord) -> None:
        """Tells the loss of an epoch that is complete, and saves if it is its turn."""
        if run.progress.position % run.plan.micro_batches:
            return
        line = f"epoch {record.epoch}: loss {run.progress.loss:.4f}"
        if run.is_done or run.epoch % run.settings.epoch_save == 0:
            line += f", {self._save(run, f'rwkv-{record.epoch}')}"
        self.say(line)

    def save_checkpoint(self, run: Run, record: StepRecord) -> None:
        """Makes a checkpoint when it is due."""
        self._try(run, self._checkpoints.require_written)
        if self._checkpoints.is_due():
            # a run that goes on from it does not save again what was saved before it
            self._collect(run, waits=True)
            self._checkpoint(run, record)

    def stop(self, run: Run, record: StepRecord) -> None:
        """Makes a checkpoint, saves what was learned and stops the run, if a signal asks for it."""
        if not self._interrupt.signal or run.is_done:
            return
        run.stopped_by, step = self._interrupt.signal, run.progress.step
        # first of all: who sent the signal may not wait long
        is_saving = self._aside.is_writing
        if self._checkpoints.step != step:
            self._checkpoint(run, record, is_saving=is_saving)
        self._try(run, self._checkpoints.wait)
        if is_saving:
            self._collect(run, waits=True)
            self._checkpoint(run, record)
            self._try(run, self._checkpoints.wait)
        what = f"stopped by signal {run.stopped_by} after step {step}"
        if run.saved_step != step:
            what += f", {self._save(run, f'{folder_name(step)}/rwkv')}"
        self.say(what)
        # last, where it is found
        if self._checkpoints.last:
            command = ["rwkv-peft", "train", "--resume", str(self._checkpoints.last)]
            self.say(f"to go on: {shlex.join(command)}")

    def _checkpoint(self, run: Run, record: StepRecord, *, is_saving: bool = False) -> None:
        self._try(run, self._checkpoints.wait)
        self._try(run, lambda: self._checkpoints.save(record, is_saving=is_saving))

    def finish(self, run: Run) -> None:
        """Waits for the last checkpoint; the last save is written by then."""
        self._try(run, self._checkpoints.wait)
        if self._answers:
            self._answers.ask_after(run)

    def _try(self, run: Run, action: Callable[[], None]) -> None:
        try:
            action()
        except CheckpointError as error:
            if run.settings.on_save_error == "stop":
                raise
            self.say(
                f"warning: no checkpoint was made: {error} (--on_save_error stop ends a run here)"
            )

    def meet_end(self, run: Run) -> None:
        """Says it of a run that has no step to take; saves what one of no steps begins with."""
        if not run.is_done:
            return
        if run.progress.step:
            # not of the log, which is that of a run that never stopped
            self._display.line(describe_end(run.plan.steps, run.settings.resume))
            return
        self._begin(run)
        files = self._save(run, f"rwkv-{run.settings.epoch_begin}")
        self.say(f"no steps to take, {files}")

    def _save(self, run: Run, name: str) -> str:
        """Saves, or begins to, and says which; at the end of a run nothing goes on meanwhile."""
        self._collect(run, waits=True)
        stem, values = self._folder.path / name, run.values
        loss, step = run.progress.loss, run.progress.step
        ends = run.is_done or run.stopped_by
        if not ends and (write := run.target.put_aside(stem, values)):
            self._aside.begin(write, loss, step)
            return f"saving {stem} while training goes on"
        generators = RandomGenerators(run.device)
        state = generators.state_dict()
        saved = run.target.save(stem, values)
        # merging attaches an adapter, which draws: a run is the same however often it saves
        generators.load_state_dict(state)
        return self._note(run, Finished(saved, loss, step))

    def _collect(self, run: Run, *, waits: bool) -> None:
        """Tells of a save that was written aside."""
        if finished := self._aside.collect(waits=waits):
            self.say(self._note(run, finished))

    def _note(self, run: Run, finished: Finished) -> str:
        saved, run.saved_loss, run.saved_step = finished
        run.saved = saved
        files = " and ".join(str(p) for p in (saved.weights, saved.adapter) if p)
        return "; ".join((f"saved {files}", *saved.remarks))
