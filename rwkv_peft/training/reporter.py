"""Loggers of other programs beside the run's own files, through one small interface."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.flops import count_flops, measure_rate
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.settings import Settings

# project, where none is named
PROJECT = "rwkv-peft"


class Logger(Protocol):
    """What takes figures."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the figures of an optimizer step by their names."""

    def close(self) -> None:
        """Ends it."""


class TensorBoard:
    """Event files in the run's folder, for `tensorboard --logdir`."""

    package = "tensorboard"

    def __init__(self, settings: Settings, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a run that was killed had written behind the place where it goes on is not shown
        purged = first_step if first_step > 1 else 0
        folder = str(Path(settings.proj_dir, "tensorboard"))
        self._writer = SummaryWriter(folder, purge_step=purged)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the figures of an optimizer step by their names."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # or a run that is killed would leave out what it has already made a checkpoint of
        self._writer.flush()

    def close(self) -> None:
        """Writes what waits."""
        self._writer.close()


class _Experiment:
    """A run of a service whose interface is that of wandb."""

    package = ""

    def __init__(self, settings: Settings, first_step: int) -> None:
        self._module = import_module(self.package)
        self._module.init(
            project=settings.wandb or PROJECT, config=asdict(settings), **self.options(settings)
        )

    def options(self, settings: Settings) -> dict[str, Any]:
        """Further arguments of its `init`."""
        return {"name": Path(settings.proj_dir).name}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the figures of an optimizer step by their names."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """Sends what waits."""
        self._module.finish()


class Wandb(_Experiment):
    """Weights & Biases."""

    package = "wandb"

    def options(self, settings: Settings) -> dict[str, Any]:
        """Its files lie in the run's folder."""
        return {"name": Path(settings.proj_dir).name, "dir": settings.proj_dir}


class Trackio(_Experiment):
    """trackio, which keeps runs on this machine."""

    package = "trackio"


class SwanLab(_Experiment):
    """SwanLab."""

    package = "swanlab"

    def options(self, settings: Settings) -> dict[str, Any]:
        """Its files lie in the run's folder."""
        logdir = str(Path(settings.proj_dir, "swanlab"))
        return {"experiment_name": Path(settings.proj_dir).name, "logdir": logdir}


LOGGERS: dict[str, type[TensorBoard] | type[_Experiment]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "swanlab": SwanLab,
}


def find_loggers(config: TrainConfig) -> list[str]:
    """The names of the loggers that a config asks for, each once.

    Raises:
        ConfigError: the package of one is not installed.
    """
    names = dict.fromkeys([*config.report_to, *["wandb"] * bool(config.wandb)])
    for name in names:
        try:
            import_module(LOGGERS[name].package)
        except ImportError as error:
            raise ConfigError(
                f"--report_to {name} needs {name}, which cannot be imported ({error}): "
                f"pip install 'rwkv-peft[{name}]', or leave it out"
            ) from error
    return list(names)


class Reporter:
    """Gives loggers what the run's own files hold; one that fails is left out from then on.

    They begin after the first step, as all that a run writes does; a run that goes on reports from
    there on.
    """

    def __init__(self, names: Iterable[str], say: Callable[[str], None]) -> None:
        self._names, self._say = list(names), say
        self._loggers: dict[str, Logger] = {}
        self._evaluated = -1
        self._tokens_at_most: float | None = None

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Reports a step, and the evaluations since the last."""
        if self._names and not self._loggers:
            rate = measure_rate(run.device, run.settings.dtype)
            self._tokens_at_most = rate and run.settings.num_ranks * rate / count_flops(run)
            # those before the last step were reported when they were made
            self._evaluated = record.step - 2
        for name in list(self._names):
            if name not in self._loggers:
                with self._harmless(name):
                    self._loggers[name] = LOGGERS[name](run.settings, record.step)
        described = describe_step(record, self._tokens_at_most)
        for step, values in (*self._find_evaluations(run), (record.step, described)):
            for name in list(self._names):
                with self._harmless(name):
                    self._loggers[name].log(values, step)

    def end(self, run: Run) -> None:
        """Reports a last evaluation, and ends all loggers."""
        if not self._loggers:
            return
        for step, values in self._find_evaluations(run):
            for name in list(self._names):
                with self._harmless(name):
                    self._loggers[name].log(values, step)
        for name in list(self._names):
            with self._harmless(name):
                self._loggers[name].close()

    def _find_evaluations(self, run: Run) -> list[tuple[int, dict[str, float]]]:
        if run.validation is None:
            return []
        found = [x for x in run.validation.evaluations if x.step > self._evaluated]
        if found:
            self._evaluated = found[-1].step
        names = ("loss", "perplexity", "bits_per_byte")
        values = ({f"val/{n}": getattr(x, n) for n in names} for x in found)
        return [
            (x.step, {n: v for n, v in y.items() if v is not None})
            for x, y in zip(found, values, strict=True)
        ]

    def _harmless(self, name: str) -> "_Harmless":
        return _Harmless(lambda error: self._leave_out(name, error))

    def _leave_out(self, name: str, error: Exception) -> None:
        if name in self._names:
            self._names.remove(name)
            self._say(f"warning: {name} fails and is left out from here on: {error!r}")


def describe_step(record: StepRecord, tokens_at_most: float | None = None) -> dict[str, float]:
    """The figures of a step by the names that loggers show.

    Args:
        tokens_at_most: a second, if the devices did nothing but the products of a step; None if
            nobody knows.
    """
    seconds = record.t_cost or 1.0
    speed = record.tokens / seconds
    share = {"speed/mfu": speed / tokens_at_most} if tokens_at_most else {}
    return share | {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "speed/tokens_per_second": speed,
        "speed/trained_tokens_per_second": record.trained_tokens / seconds,
        "speed/seconds": record.t_cost,
        "memory/peak_bytes": record.peak_memory,
    }


class _Harmless:
    """Work of a package of others, of which no error whatever may end training."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            self._on_error(error)
            return True
        return False
