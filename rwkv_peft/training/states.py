"""Training of states: what the loop needs of them, and their files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_peft.checkpoint.state import read_state, write_state
from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import find_storage
from rwkv_peft.state import RWKVState
from rwkv_peft.training.change import NOTHING_LEARNED, digest, is_unchanged
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.saved import Saved
from rwkv_peft.training.settings import Settings

# numbers of a rank, summed over all
SumOverRanks = Callable[[Sequence[float]], list[float]]


class States:
    """Learned initial states over a frozen model."""

    plain: tuple[str, ...] = ()

    def __init__(self, settings: Settings, model: RWKV, names: list[str]) -> None:
        is_full = settings.train_type == "fullstate"
        self.parameters = LearnedStates(model, names, is_full=is_full)
        self._storage = find_storage(model)
        # each state is clipped as a whole, so that several are what each is alone
        self.clip_groups = {
            self.parameters.key(name, tensor): name
            for name in self.parameters.names
            for tensor in self.parameters.tensors(name)
        }
        self.initial_values: dict[str, Tensor] = {}
        if settings.load_adapter:
            saved = read_state(settings.load_adapter, model.model_config)
            for name in self.parameters.names:
                wanted = self.parameters.tensors(name)
                if wanted.keys() != saved.keys():
                    raise ConfigError(
                        f"--load_adapter {settings.load_adapter} holds a "
                        f"{'plain' if is_full else 'full'} state: give --train_type "
                        f"{'state' if is_full else 'fullstate'}"
                    )
                self.initial_values |= {self.parameters.key(name, n): x for n, x in saved.items()}

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Notes the values with which training begins."""
        self._first = digest(values)

    def initial_state(self, batch: Batch) -> RWKVState | None:
        """The state in which the rows of a micro-batch begin."""
        return self.parameters.rows(self._names(batch))

    def penalty(self) -> Tensor | None:
        """An objective beside the loss: there is none."""
        return None

    def before_clipping(self, micro_batches: Sequence[Batch], add_up: SumOverRanks) -> None:
        """Divides the gradient of each state by its own tokens, as if it were trained alone."""
        # so far the loss was divided by the tokens of all states
        tokens = dict.fromkeys(self.parameters.names, 0.0)
        for batch in micro_batches:
            weights = (batch.targets != IGNORE) if batch.weights is None else batch.weights
            for name, count in zip(self._names(batch), weights.sum(1).tolist(), strict=True):
                tokens[name] += count
        counts = add_up(list(tokens.values()))
        total = sum(counts)
        for name, count in zip(tokens, counts, strict=True):
            for tensor in self.parameters.tensors(name).values():
                if tensor.grad is not None and count:
                    tensor.grad *= total / count

    def after_step(self, optimizer: Optimizer) -> None:
        """Called between the step and the clearing of its gradients."""

    def complete(self, stem: Path) -> Saved:
        """Names the first of the states that were saved: there is nothing to merge."""
        return Saved(self._path(stem, self.parameters.names[0]), None)

    def save(self, stem: Path, values: Mapping[str, Tensor], *, merges: bool = True) -> Saved:
        """Writes `stem`.pth with the state alone, or one such file for each of several."""
        paths = []
        for name in self.parameters.names:
            path = self._path(stem, name)
            write_state(path, self.parameters.tensors(name, values), self._storage)
            paths.append(path)
        more: tuple[str, ...] = ()
        if len(paths) > 1:
            more = (f"saved {', '.join(str(p) for p in paths[1:])}",)
        if is_unchanged(self._first, values):
            more += (NOTHING_LEARNED,)
        return Saved(paths[0], None, more)

    def put_aside(self, stem: Path, values: Mapping[str, Tensor]) -> None:
        """States are small: nothing is put aside."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered from step to step: nothing but what the states began as."""
        return {"first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._first = state["first"]

    def _names(self, batch: Batch) -> list[str]:
        return batch.states or [self.parameters.names[0]] * len(batch.tokens)

    def _path(self, stem: Path, name: str) -> Path:
        return stem.with_name(f"{stem.name}{'-' * bool(name)}{name}.pth")
