"""What a run trains: all weights, an adapter or states, each with its files."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rwkv_peft.checkpoint.adapter import attach_saved, to_saved
from rwkv_peft.checkpoint.apart import merge_apart
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.folder import SavedAdapter, write_folder
from rwkv_peft.checkpoint.merge import merge
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import STATE_SUFFIX, read_weights, write_like
from rwkv_peft.checkpoint.report import MergeReport
from rwkv_peft.checkpoint.stream import Spec, write_tensors
from rwkv_peft.checkpoint.trial import try_cycle
from rwkv_peft.data.batching import Batch
from rwkv_peft.device import free_host_memory
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods import residual
from rwkv_peft.methods.adalora import AdaLora
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.methods.buffers import Buffers
from rwkv_peft.methods.penalty import penalty
from rwkv_peft.methods.sketch import block_of
from rwkv_peft.models.base import RWKV
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.state import RWKVState
from rwkv_peft.training.change import NOTHING_LEARNED, digest, is_unchanged
from rwkv_peft.training.inputs import FileMark, find_change
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.saved import Saved
from rwkv_peft.training.settings import Settings
from rwkv_peft.training.states import States, SumOverRanks

# bytes of a base below which merging takes less than a second
ASIDE = 1 << 28
# host memory that a trained number must find free to be put aside: twice its bytes in float32
HELD = 8


class TrainTarget(Protocol):
    """What the loop needs of it."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""

    @property
    def plain(self) -> Collection[str]:
        """Names among them of the model's own tensors."""

    @property
    def initial_values(self) -> Mapping[str, Tensor]:
        """Values of a saved adapter or state, as fine as float32, by name."""

    @property
    def clip_groups(self) -> Mapping[str, str] | None:
        """Which tensors are clipped together, by name; None: all."""

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Notes the values with which training begins."""

    def initial_state(self, batch: Batch) -> RWKVState | None:
        """The state in which the rows of a micro-batch begin; None: the model's own start."""

    def penalty(self) -> Tensor | None:
        """An objective beside the loss, once an optimizer step."""

    def before_clipping(self, micro_batches: Sequence[Batch], add_up: SumOverRanks) -> None:
        """Called between the gradients of a step and their clipping."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called between the step and the clearing of its gradients."""

    def save(self, stem: Path, values: Mapping[str, Tensor], *, merges: bool = True) -> Saved:
        """Writes the files whose names begin with `stem`; the merged model only if `merges`."""

    def complete(self, stem: Path) -> Saved:
        """Writes the merged model of files that were saved without it, if it has one."""

    def put_aside(self, stem: Path, values: Mapping[str, Tensor]) -> Callable[[], Saved] | None:
        """Copies what `save` would write to host memory, and gives its writing, for a thread.

        None where that is not worth it: `save` takes a moment, or memory is short.
        """

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from step to step, beside the values of its parameters."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


def make_target(
    settings: Settings,
    model: RWKV,
    base: Mapping[str, Tensor],
    mark: FileMark,
    names: Collection[str],
    steps: int,
    strategy: Strategy,
) -> TrainTarget:
    """Attaches the method of a run to its model.

    Args:
        base: the tensors of the model's file.
        mark: of that file, when they were read.
        names: of the states in the data; empty if it names none.
        steps: optimizer steps of the run.
        strategy: by which other ranks may have parts of its blocks.
    """
    if settings.peft == "state":
        return States(settings, model, sorted(names) or [""])
    return Weights(settings, model, base, mark, steps, strategy)


class Base:
    """The file that a run began with, which may change or go while it runs.

    Attributes:
        mark: of the file, when it was read.
        fingerprint: of its weights.
        specs: of its tensors, in their order.
        states: its learned state, if it has one.
    """

    def __init__(self, weights: Mapping[str, Tensor], mark: FileMark) -> None:
        self.mark, self.fingerprint = mark, fingerprint(weights)
        self.specs = {name: Spec(tuple(x.shape), x.dtype) for name, x in weights.items()}
        self.states = {n: x.clone() for n, x in weights.items() if n.endswith(STATE_SUFFIX)}


def _copy_to_host(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def saved_endings(settings: Settings, names: Collection[str]) -> list[str]:
    """What the names of the files of one save have behind the stem.

    Args:
        names: of the states in the data; empty if it names none.
    """
    if settings.peft == "state":
        return [f"{'-' * bool(name)}{name}.pth" for name in sorted(names) or [""]]
    if settings.peft == "none":
        return [".pth"]
    return ["-adapter", ".pth"] if settings.merge else ["-adapter"]


class Weights:
    """Weights of the model, or an adapter beside them, or both."""

    clip_groups = None

    def __init__(
        self,
        settings: Settings,
        model: RWKV,
        weights: Mapping[str, Tensor],
        mark: FileMark,
        steps: int,
        strategy: Strategy,
    ) -> None:
        self._settings, self._model, self._base = settings, model, Base(weights, mark)
        self._whole = partial(strategy.whole, model)
        self.initial_values: Mapping[str, Tensor] = {}
        own: list[Tensor] = [*model.parameters(), *model.buffers()]
        if settings.load_adapter:
            attachment, self.initial_values = attach_saved(
                model,
                settings.load_adapter,
                hints=LegacyAdapterHints(**settings.peft_config),
                train_parts=settings.train_parts,
                base_fingerprint=self._base.fingerprint,
                force=settings.force,
                is_fused=bool(settings.fused_adapter),
                weights=weights,
            )
        else:
            options = dict(settings.peft_config)
            if settings.peft == "adalora":
                options.setdefault("total_step", max(1, steps))
            attachment = attach(
                model,
                settings.peft,
                options,
                train_parts=settings.train_parts,
                is_fused=bool(settings.fused_adapter),
                weights=weights,
            )
        try_cycle(model, attachment)
        self.parameters: Attachment = attachment
        self.plain = attachment.plain
        self._adalora = AdaLora(attachment) if AdaLora.is_in(attachment) else None
        self._buffers = Buffers(attachment.peft_model or model, [*own, *attachment.values()])

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Notes the values with which training begins."""
        self._first = digest(values)

    def initial_state(self, batch: Batch) -> RWKVState | None:
        """The state in which the rows of a micro-batch begin: the model's own start."""
        return None

    def penalty(self) -> Tensor | None:
        """The objective of a method beside the loss."""
        return self._adalora.penalty() if self._adalora else penalty(self.parameters)

    def before_clipping(self, micro_batches: Sequence[Batch], add_up: SumOverRanks) -> None:
        """Called between the gradients of a step and their clipping."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Lets AdaLoRA move its ranks."""
        if self._adalora:
            optimizer.load(self._adalora.allocate(optimizer.gradients, optimizer.values))

    def save(self, stem: Path, values: Mapping[str, Tensor], *, merges: bool = True) -> Saved:
        """Writes `stem`.pth with all weights, and the folder `stem`-adapter of an adapter."""
        remarks = self._remarks(values)
        if self.parameters.peft_model is None:
            return self._write_weights(stem, values, remarks)
        saved = to_saved(self.parameters, values, self._base.fingerprint, self._whole)
        return self._write_adapter(stem, saved, remarks, merge if merges else None)

    def put_aside(self, stem: Path, values: Mapping[str, Tensor]) -> Callable[[], Saved] | None:
        """Copies what `save` would write to host memory; None for a small base."""
        specs, is_whole = self._base.specs, self.parameters.peft_model is None
        trained = sum(parameter.numel() for parameter in self.parameters.values())
        base = sum(spec.numel * spec.dtype.itemsize for spec in specs.values())
        free = free_host_memory()
        if base < ASIDE or (free is not None and trained * HELD > free):
            return None
        remarks = self._remarks(values)
        if is_whole:
            held = {n: _copy_to_host(values[n].to(specs[n].dtype)) for n in values}
            return partial(self._write_weights, stem, held, remarks)
        found = to_saved(self.parameters, values, self._base.fingerprint, self._whole)
        tensors = {n: _copy_to_host(x) for n, x in found.tensors.items()}
        saved = found._replace(config=copy.deepcopy(found.config), tensors=tensors)
        return partial(self._write_adapter, stem, saved, remarks, merge_apart)

    def _remarks(self, values: Mapping[str, Tensor]) -> tuple[str, ...]:
        return (NOTHING_LEARNED,) if is_unchanged(self._first, values) else ()

    def _write_weights(
        self, stem: Path, values: Mapping[str, Tensor], remarks: tuple[str, ...]
    ) -> Saved:
        weights = stem.with_name(stem.name + ".pth")
        if change := find_change(self._settings.load_model, self._base.mark):
            return self._save_alone(weights, values, change)
        write_like(weights, self._settings.load_model, values)
        return Saved(weights, None, remarks)

    def _write_adapter(
        self,
        stem: Path,
        saved: SavedAdapter,
        remarks: tuple[str, ...],
        merge: Callable[..., MergeReport] | None,
    ) -> Saved:
        adapter = stem.with_name(stem.name + "-adapter")
        change = find_change(self._settings.load_model, self._base.mark)
        write_folder(adapter, saved, self._settings.load_model)
        if not self._settings.merge or merge is None:
            return Saved(None, adapter, remarks)
        return self._merge(stem, adapter, remarks, merge, change)

    def complete(self, stem: Path) -> Saved:
        """Merges an adapter that was saved without, if the run merges."""
        if self.parameters.peft_model is None:
            return Saved(stem.with_name(stem.name + ".pth"), None)
        adapter = stem.with_name(stem.name + "-adapter")
        if not self._settings.merge:
            return Saved(None, adapter)
        change = find_change(self._settings.load_model, self._base.mark)
        return self._merge(stem, adapter, (), merge, change)

    def _merge(
        self,
        stem: Path,
        adapter: Path,
        remarks: tuple[str, ...],
        merge: Callable[..., MergeReport],
        change: str,
    ) -> Saved:
        base, weights = self._settings.load_model, stem.with_name(stem.name + ".pth")
        if change:
            failure = (
                f"{change} while the run went on, so that nothing was merged; with the base as it "
                f"was: rwkv-peft merge --base_model {base} --adapter {adapter} --output {weights}"
            )
            return Saved(None, adapter, (failure, *remarks), failure)
        # the base was checked when the run began
        options = {"overwrite": True, "may_be_unchanged": True, "check_files": False}
        report = merge(base, adapter, weights, compare=0, **options)
        if not report.changed and not remarks:
            remarks = ("the merged file equals the base: --lr_init is too small to change it",)
        return Saved(weights, adapter, remarks)

    def _save_alone(self, path: Path, values: Mapping[str, Tensor], change: str) -> Saved:
        """Writes all weights without the file that they began as."""
        base, frozen = self._base, dict(self._model.named_parameters())

        def tensor(name: str) -> Tensor:
            held = next(x for x in (values, base.states, frozen) if name in x)
            with self._whole(block_of(name) if held is frozen else ""):
                x = held[name]
                if hasattr(x, "full_tensor"):
                    raise CheckpointError(
                        f"{change} while the run went on, and ranks have parts of {name}, which is "
                        "not trained: put the file back as it was"
                    )
                return x.to(base.specs[name].dtype, copy=held is frozen)

        write_tensors(path, base.specs, tensor)
        remark = f"{change} while the run went on: what was not trained is as the run held it"
        return Saved(path, None, (f"{remark}, in {self._settings.precision}",))

    def state_dict(self) -> dict[str, Any]:
        """What the method holds beside its trained values, and what these began as."""
        return {
            "first": self._first,
            "start": self.parameters.start,
            "buffers": self._buffers.state_dict(),
            "adalora": self._adalora.state_dict() if self._adalora else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._first = state["first"]
        self._buffers.load_state_dict(state["buffers"])
        if start := self.parameters.start:
            weights = read_weights(self._settings.load_model)
            residual.begin_again(self._model, weights, start, state["start"])
        if self._adalora:
            self._adalora.load_state_dict(state["adalora"])
