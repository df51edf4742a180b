"""What happens at an evaluation: it is made, logged and shown, and the best model is kept."""

import re
from collections.abc import Callable

from rwkv_peft.training.evaluate import undisturbed
from rwkv_peft.training.folder import remove_results
from rwkv_peft.training.metrics import EVALUATIONS, RunFolder, StepRecord
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.validation import Evaluation, Sample

# stem of the files of the best evaluation
BEST = "rwkv-best"


class Validator:
    """Evaluates a run that has a validation; `run_steps` calls `after_step`."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        # the best's files are of a later step than the run goes on from
        self._is_given_up = bool(re.search(r'"is_best":\strue', folder.given_up(EVALUATIONS)))

    def begin(self, run: Run, record: StepRecord) -> None:
        """Removes the best of a course that was given up, before its evaluations are cut off."""
        if self._is_given_up:
            remove_results(self._folder.path, BEST)
            self._is_given_up = False

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Evaluates when it is due; a run that was stopped makes up for it when it goes on."""
        if not run.stopped_by:
            self.evaluate(run)

    def evaluate(self, run: Run) -> None:
        """Evaluates when it is due, keeps the best, and tells when it is enough."""
        validation, progress = run.validation, run.progress
        micro_batches = run.plan.micro_batches
        is_epoch_end = progress.position % micro_batches == 0
        if validation is None or not validation.is_due(progress.step, is_epoch_end=is_epoch_end):
            return
        epoch = run.settings.epoch_begin + max(0, progress.position - 1) // micro_batches
        run.strategy.ask("evaluate", progress.step, epoch)
        found, samples = run.evaluate(progress.step, epoch)
        if progress.step and run.is_done:
            # no step will be the first that writes
            self._folder.begin()
        self._folder.record_evaluation(found, samples)
        if found:
            self._say(_describe(found))
        for sample in samples:
            self._say(_show(sample))
        if found and found.is_best:
            self._is_given_up = False
            with undisturbed(run.model):
                # merged once, at the end: a model may be large
                saved = run.target.save(self._folder.path / BEST, run.values, merges=False)
            if not saved.weights:
                # merged from the best that a run had ended with before it was resumed
                (self._folder.path / f"{BEST}.pth").unlink(missing_ok=True)
        if validation.is_enough:
            patience = run.settings.early_stopping_patience
            self._say(f"stopped early: {patience} evaluations in a row were no better")

    def end(self, run: Run) -> None:
        """Tells which evaluation was the best, and merges its adapter."""
        best = run.validation.best if run.validation else None
        if best is None:
            return
        line = f"best evaluation: loss {best.loss:.4f} after step {best.step:d}"
        # a run that was resumed in another folder may have left its best where it was
        has_files = any(self._folder.path.glob(f"{BEST}*"))
        if not run.stopped_by and has_files:
            with undisturbed(run.model):
                run.best = run.target.complete(self._folder.path / BEST)
            files = " and ".join(str(p) for p in (run.best.weights, run.best.adapter) if p)
            line = "; ".join((f"{line}, saved {files}", *run.best.remarks))
        elif not has_files:
            line += f"; it was made before the run was resumed, and {self._folder.path} has it not"
        self._say(line)


def _describe(found: Evaluation) -> str:
    if found.loss is None:
        return f"step {found.step}: evaluation: the loss is no finite number"
    parts = [f"loss {found.loss:.4f}"]
    parts += [f"perplexity {found.perplexity:.2f}"] if found.perplexity else []
    parts += [f"{found.bits_per_byte:.4f} bits per byte"] if found.bits_per_byte else []
    return f"step {found.step}: evaluation: {', '.join(parts)}{', the best' * found.is_best}"


def _show(sample: Sample) -> str:
    state = f" (state {sample.state})" if sample.state else ""
    return f"step {sample.step}: sample{state}: {sample.prompt!r} -> {sample.text!r}"
