"""What happens after a step: logging, showing, saving."""

from collections.abc import Iterable

from rwkv_peft.training.folder import Claim
from rwkv_peft.training.infctx import InfctxStep
from rwkv_peft.training.interrupt import Interrupt
from rwkv_peft.training.loop import Run
from rwkv_peft.training.metrics import Display, RunFolder, StepRecord


class Recorder:
    """Logs, shows and saves after a step; the functions that `run_steps` calls are its methods.

    Nothing is written before the first step is done: a run that cannot take it leaves no trace, and
    an earlier one in its place.
    """

    def __init__(
        self, claim: Claim, folder: RunFolder, display: Display, interrupt: Interrupt
    ) -> None:
        self._claim, self._folder = claim, folder
        self._display, self._interrupt = display, interrupt
        self._has_begun = self._has_problem = False

    def say(self, line: str) -> None:
        """Shows a line to the user and keeps it in the log."""
        self._display.line(line)
        self._folder.log(line)

    def introduce(self, run: Run, lines: Iterable[str]) -> None:
        """Says what a run will do, and from now on shows the chunks of its long rows."""
        for line in lines:
            self.say(line)
        if isinstance(run.step, InfctxStep):
            run.step.after_chunk = self._display.show_chunk

    def log(self, run: Run, record: StepRecord) -> None:
        """Notes every step."""
        self._begin(run)
        while run.remarks:
            self.say(run.remarks.pop(0))
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
            self._folder.write_config(run.settings)
            self._folder.begin()

    def save_stopped(self, run: Run, record: StepRecord) -> None:
        """Saves what was learned, and stops the run, when a signal asks for it."""
        if not self._interrupt.signal:
            return
        run.stopped_by, step = self._interrupt.signal, run.progress.step
        files = self._save(run, f"checkpoints/step-{step:06d}/rwkv")
        self.say(f"stopped by signal {run.stopped_by} after step {step}, saved {files}")

    def end_epoch(self, run: Run, record: StepRecord) -> None:
        """Tells the loss of an epoch that is complete, and saves if it is its turn."""
        if run.progress.position % run.plan.micro_batches or run.stopped_by:
            return
        line = f"epoch {record.epoch}: loss {run.progress.loss:.4f}"
        if run.is_done or run.epoch % run.settings.epoch_save == 0:
            line += f", saved {self._save(run, f'rwkv-{record.epoch}')}"
        self.say(line)

    def save_start(self, run: Run) -> None:
        """Saves what a run of no steps begins with."""
        self._begin(run)
        files = self._save(run, f"rwkv-{run.settings.epoch_begin}")
        self.say(f"no steps to take, saved {files}")

    def _save(self, run: Run, name: str) -> str:
        saved = run.target.save(self._folder.path / name, run.optimizer.values)
        run.saved, run.saved_loss = saved, run.progress.loss
        files = " and ".join(str(p) for p in (saved.weights, saved.adapter) if p)
        return "; ".join((files, *saved.remarks))
