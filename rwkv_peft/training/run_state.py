"""A run that can be taken up where it is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.models.base import RWKV
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.training.by_name import Computed
from rwkv_peft.training.choose import Plan
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.progress import Progress, RandomGenerators
from rwkv_peft.training.saved import Saved
from rwkv_peft.training.settings import Settings
from rwkv_peft.training.step import Step
from rwkv_peft.training.target import TrainTarget
from rwkv_peft.training.validation import Evaluation, Sample, Validation


@dataclass(slots=True)
class Run:
    """Everything that one step changes hangs here.

    Attributes:
        saved: files of the last save, None before the first.
        saved_loss: mean loss of the epoch, or the part of one, that they end.
        saved_step: optimizer steps that had been taken then.
        stopped_by: number of the signal that ends it after this step, 0 if none does.
        remarks: what came up during a step, to be told to the user after it.
        validation: what is evaluated while it goes on, None if nothing is.
        best: files of the best evaluation, None before the end.
        strategy: what it shares with other ranks.
    """

    plan: Plan
    model: RWKV
    target: TrainTarget
    optimizer: Optimizer
    step: Step
    progress: Progress = field(default_factory=Progress)
    saved: Saved | None = None
    saved_loss: float = math.nan
    saved_step: int = 0
    stopped_by: int = 0
    remarks: list[str] = field(default_factory=list)
    validation: Validation | None = None
    best: Saved | None = None
    strategy: Strategy = field(default_factory=Strategy)

    @property
    def settings(self) -> Settings:
        """What it does."""
        return self.plan.settings

    @property
    def device(self) -> torch.device:
        """Where its model is."""
        device: torch.device = self.model.emb.weight.device
        return device

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or more would not make it better."""
        is_enough = self.validation is not None and self.validation.is_enough
        return is_enough or self.progress.step >= self.plan.steps

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.progress.position // self.plan.micro_batches

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Of what is trained, in float32, by name, for rank 0, which asks the others for parts."""
        return Computed(list(self.optimizer.values), self._value)

    def _value(self, name: str) -> Tensor:
        if name in self.strategy.in_parts:
            self.strategy.ask("value", name)
        return self.optimizer.values[name]

    def evaluate(self, step: int, epoch: int) -> tuple[Evaluation | None, list[Sample]]:
        """Evaluates the model as it is after so many steps; of several ranks all are asked."""
        assert self.validation is not None
        found = self.validation.evaluate(self.model, self.target, step, epoch)
        self.strategy.settle(self.model)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that must be kept to go on as if the run had never stopped.

        The learning rate follows from the step, and the order of the data from the seed. Of several
        ranks all are asked for it, and rank 0 has it; what they have parts of, they give when its
        names are gone through, see `give_parts`.
        """
        random = self.strategy.collect(RandomGenerators(self.device).state_dict())
        return {
            "progress": self.progress.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random[0] if len(random) == 1 else random,
            "validation": self.validation.state_dict() if self.validation else {},
        }

    def give_parts(self) -> None:
        """Takes part in the `state_dict` of rank 0."""
        optimizer = self.state_dict()["optimizer"]
        if self.strategy.in_parts:
            for found in (optimizer["values"], optimizer["moments"]):
                for name in found:
                    found[name]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` of a run with the same settings gave."""
        self.progress.load_state_dict(state["progress"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        random = state["random"] if isinstance(state["random"], list) else [state["random"]]
        if len(random) == self.strategy.size:
            RandomGenerators(self.device).load_state_dict(random[self.strategy.rank])
        # that of a run that evaluated nothing is empty
        if self.validation and state["validation"]:
            self.validation.load_state_dict(state["validation"])
