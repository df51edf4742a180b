"""What a run trains: all weights, an adapter or states, each with its files."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from rwkv_peft.checkpoint.adapter import attach_saved, write_adapter
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.merge import merge
from rwkv_peft.checkpoint.older import Unsaved
from rwkv_peft.checkpoint.pth import write_like
from rwkv_peft.checkpoint.state import read_state, write_state
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.adalora import AdaLora
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState
from rwkv_peft.training.optim import Optimizer


class Saved(NamedTuple):
    """The files of a save, None where there is none, and what is to be said of them."""

    weights: Path | None
    adapter: Path | None
    remarks: tuple[str, ...] = ()


class Trainee(Protocol):
    """What the loop needs of it."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""

    @property
    def plain(self) -> Collection[str]:
        """Names among them of the model's own tensors."""

    @property
    def values(self) -> Mapping[str, Tensor]:
        """What they hold at first, where that is finer than the model's type."""

    def state(self, batch: Batch) -> RWKVState | None:
        """Where the rows of a micro-batch begin."""

    def penalty(self) -> Tensor | None:
        """What is minimised beside the loss, once an optimizer step."""

    def before_step(self) -> None:
        """Between the gradients of a step and the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Between the step and the clearing of its gradients."""

    def save(self, stem: Path, values: Mapping[str, Tensor]) -> Saved:
        """Writes the files that begin with `stem`."""


def make_trainee(
    config: TrainConfig, model: RWKV, base: Mapping[str, Tensor], names: Collection[str], steps: int
) -> Trainee:
    """Attaches the method of a run to its model.

    Args:
        base: the tensors of the model's file.
        names: of the states in the data; none, if it names none.
        steps: optimizer steps of the run.
    """
    if config.peft == "state":
        return States(config, model, sorted(names) or [""])
    return Weights(config, model, fingerprint(base), steps)


class Weights:
    """Weights of the model, or an adapter beside them, or both."""

    def __init__(self, config: TrainConfig, model: RWKV, base: str, steps: int) -> None:
        self._config, self._base = config, base
        self.values: Mapping[str, Tensor] = {}
        if config.load_adapter:
            attachment, self.values = attach_saved(
                model,
                config.load_adapter,
                unsaved=Unsaved(**config.peft_config),
                train_parts=config.train_parts,
                base_fingerprint=base,
                force=config.force,
                is_fused=bool(config.fused_adapter),
            )
        else:
            options = dict(config.peft_config)
            if config.peft == "adalora":
                options.setdefault("total_step", steps)
            attachment = attach(
                model,
                config.peft,
                options,
                train_parts=config.train_parts,
                is_fused=bool(config.fused_adapter),
            )
        self.parameters: Attachment = attachment
        self.plain = attachment.plain
        self._adalora = AdaLora(attachment) if AdaLora.is_in(attachment) else None

    def state(self, batch: Batch) -> RWKVState | None:
        """Where the rows of a micro-batch begin."""
        return None

    def penalty(self) -> Tensor | None:
        """What is minimised beside the loss."""
        return self._adalora.penalty() if self._adalora else None

    def before_step(self) -> None:
        """Between the gradients of a step and the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Between the step and the clearing of its gradients."""
        if self._adalora:
            optimizer.load(self._adalora.allocate(optimizer.gradients, optimizer.values))

    def save(self, stem: Path, values: Mapping[str, Tensor]) -> Saved:
        """`stem`.pth with all weights, and the folder `stem`-adapter if there is an adapter."""
        config, weights = self._config, stem.with_name(stem.name + ".pth")
        if self.parameters.peft_model is None:
            write_like(weights, config.load_model, values)
            return Saved(weights, None)
        adapter = stem.with_name(stem.name + "-adapter")
        write_adapter(
            adapter, self.parameters, values, base=config.load_model, base_fingerprint=self._base
        )
        if not config.merge:
            return Saved(None, adapter)
        report = merge(config.load_model, adapter, weights, force=True, compare=0)
        remarks = (report.lines()[0],) if report.is_lossy else ()
        return Saved(weights, adapter, remarks)


class States:
    """Learned initial states over a frozen model."""

    def __init__(self, config: TrainConfig, model: RWKV, names: list[str]) -> None:
        self._config = config
        is_full = config.train_type == "fullstate"
        self.parameters = LearnedStates(model, names, is_full=is_full)
        self.plain: tuple[str, ...] = ()
        self.values: dict[str, Tensor] = {}
        if config.load_adapter:
            saved = read_state(config.load_adapter, model.model_config)
            for name in self.parameters.names:
                wanted = self.parameters.tensors(name)
                if wanted.keys() != saved.keys():
                    raise ConfigError(
                        f"--load_adapter {config.load_adapter} holds a "
                        f"{'plain' if is_full else 'full'} state: give --train_type "
                        f"{'state' if is_full else 'fullstate'}"
                    )
                self.values |= {self.parameters.key(name, n): x for n, x in saved.items()}
        self._tokens: dict[str, float] = {}

    def state(self, batch: Batch) -> RWKVState | None:
        """Where the rows of a micro-batch begin."""
        names = batch.states or [self.parameters.names[0]] * len(batch.tokens)
        weights = (batch.targets != IGNORE) if batch.weights is None else batch.weights
        counts = weights.sum(1)
        for name, count in zip(names, counts.tolist(), strict=True):
            self._tokens[name] = self._tokens.get(name, 0.0) + count
        return self.parameters.rows(names)

    def penalty(self) -> Tensor | None:
        """What is minimised beside the loss."""
        return None

    def before_step(self) -> None:
        """Between the gradients of a step and the step."""
        # the loss was divided by the tokens of all states, and each shall be what it is alone
        total = sum(self._tokens.values())
        for name, tokens in self._tokens.items():
            for tensor in self.parameters.tensors(name).values():
                if tensor.grad is not None and tokens:
                    tensor.grad *= total / tokens
        self._tokens.clear()

    def after_step(self, optimizer: Optimizer) -> None:
        """Between the step and the clearing of its gradients."""

    def save(self, stem: Path, values: Mapping[str, Tensor]) -> Saved:
        """`stem`.pth with the state alone, or one such file for each of several."""
        paths = []
        for name in self.parameters.names:
            path = stem.with_name(f"{stem.name}{'-' * bool(name)}{name}.pth")
            write_state(path, self.parameters.tensors(name, values))
            paths.append(path)
        more = (f"saved {', '.join(str(p) for p in paths[1:])}",) if len(paths) > 1 else ()
        return Saved(paths[0], None, more)
