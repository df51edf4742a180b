"""Merging: an official file with adapters and learned states added, and what was lost by it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import attach_to_base, read_adapter
from rwkv_peft.checkpoint.compare import compare_models, draw_sample
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.folder import SavedAdapter
from rwkv_peft.checkpoint.mapped import build_mapped, upcast_on_use
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import STATE_SUFFIX, infer_model_config, read_weights
from rwkv_peft.checkpoint.records import require_sums
from rwkv_peft.checkpoint.report import REPORT, MergeBase, MergeReport
from rwkv_peft.checkpoint.state import is_state_file, read_state
from rwkv_peft.checkpoint.stored import BaseAsTrained, noted_storage, storage_of
from rwkv_peft.checkpoint.stream import Spec, StoredDtype, require_ending, round_to, write_tensors
from rwkv_peft.data.sources import find_sources
from rwkv_peft.device import dtype_of
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.guard import require_free
from rwkv_peft.methods.merge import Addition, MergedWeights, split_rows
from rwkv_peft.methods.sketch import AsTrained
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import Storage

# tokens on which a merged file is compared with the adapter model
COMPARED = 64

# an adapter or a state, and the weight of its change
Source: TypeAlias = tuple[str | Path, float]


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Computes in one thread: on small pieces, several would mostly wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def merge(
    base_model: str | Path,
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] = (),
    dtype: StoredDtype = "keep",
    lora_alpha: float | None = None,
    pissa_init: str | Path = "",
    force: bool = False,
    merge_base: MergeBase = "trained",
    compare: int = COMPARED,
    data_file: str = "",
    overwrite: bool = False,
    may_be_unchanged: bool = False,
    check_files: bool = True,
) -> MergeReport:
    """Writes `output`: the official file `base_model` with adapters or learned states added.

    Sums are float32 and rounded once. A tensor without a change keeps its bits if it keeps its
    dtype, and the file keeps its order. With LoRA and MiSS a few rows are in memory at a time, with
    other methods one matrix. `merge_report.json` is written beside the output.

    Args:
        adapter: a folder in peft's format, a state or an older adapter file, or several of them.
        weights: factors of their changes, one for each adapter; 1 if left out.
        dtype: of the file's tensors; 'keep' leaves each as in the base.
        lora_alpha, pissa_init: what an older file does not hold, see `LegacyAdapterHints`.
        force: add an adapter that was trained on another base, or that is not what it was then.
        merge_base: of a base stored in 8 or 4 bits in training: as trained, or as in its file.
        compare: tokens on which the merged file is compared with the adapter model; 0 for none.
        data_file: held-out rows to compare on, in any form of training; a built-in text if empty.
        overwrite: replace what has the name of the output, if it is nothing that is read.
        may_be_unchanged: write the file too where nothing in it is changed.
        check_files: first compare the checksums of `.pth` files.
    Raises:
        ConfigError: the output cannot have this name.
        CheckpointError: a file cannot be read or written, an adapter does not fit the base or
            changes nothing, or fp16 cannot hold a value.
    """
    pairs = _pair(adapter, weights)
    inputs = [base_model, pissa_init, *(source for source, _ in pairs)]
    _require_files(output, inputs, data_file, overwrite, check_files)
    base = read_weights(base_model)
    text = draw_sample(infer_model_config(base).vocab_size, compare, data_file)
    report = _begin_report(base_model, pairs, output, infer_model_config(base).version)
    read = _read_adapters(base, pairs, LegacyAdapterHints(lora_alpha, pissa_init), force)
    values, storage, additions, checks = _take(base, read, pairs, report, merge_base, force)
    merged, states = MergedWeights(values, additions), _add_up_states(base, pairs)
    # not around the lines above: attaching may decompose whole matrices, which threads speed up
    with _use_one_thread():
        if not may_be_unchanged:
            _require_change(values, merged, states, pairs)
        _write(base, values, merged, states, dtype, report)
        report.note(checks)
        if text.rows:
            adapted = _build_adapter_model(base, merged, additions, states, storage)
            report.comparison = compare_models(adapted, _map_whole(output), text)
    report.write()
    return report


def _begin_report(
    base_model: str | Path, pairs: Sequence[Source], output: str | Path, version: str
) -> MergeReport:
    names, factors = [str(source) for source, _ in pairs], [factor for _, factor in pairs]
    return MergeReport(str(base_model), names, factors, str(output), "", version)


def _pair(adapter: str | Path | Sequence[str | Path], weights: Sequence[float]) -> list[Source]:
    sources = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    if weights and len(weights) != len(sources):
        raise ConfigError(f"{len(sources)} adapters came with {len(weights)} weights")
    return list(zip(sources, weights or [1.0] * len(sources), strict=True))


def _require_files(
    output: str | Path,
    inputs: Sequence[str | Path],
    data_file: str,
    overwrite: bool,
    check_files: bool,
) -> None:
    require_ending(output)
    data = [file for x in find_sources(data_file) for file in x.files] if data_file else []
    require_free(output, inputs=[*inputs, *data], overwrite=overwrite)
    report = Path(output).with_name(REPORT)
    is_ours = overwrite or _is_report(report)
    require_free(report, inputs=[*inputs, *data], overwrite=is_ours, flag="the report")
    if check_files:
        require_sums(*inputs)


def _is_report(path: Path) -> bool:
    """Whether a file is the report of an earlier merge."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= {"base_model", "adapters", "output"}


def _write(
    base: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    merged: MergedWeights,
    states: Mapping[str, Tensor],
    dtype: StoredDtype,
    report: MergeReport,
) -> None:
    """Writes the merged file and notes in the report what was added and what rounding took.

    Args:
        base: of the file, whose order and dtypes the merged one has.
        values: what the adapters are added to.
    """
    names, report.states = merged.names, len(states)
    stored = {n: x.dtype if dtype == "keep" else dtype_of(dtype) for n, x in base.items()}
    specs = {n: Spec(tuple(x.shape), stored[n]) for n, x in base.items()}
    specs |= {n: Spec(tuple(x.shape), torch.float32) for n, x in states.items()}
    report.dtype = " and ".join(sorted({str(stored[n]).removeprefix("torch.") for n in names}))
    total = torch.zeros(3, dtype=torch.float64)

    def pieces(name: str) -> Iterator[Tensor]:
        if name in states:
            yield states[name]
        elif name not in names:
            for x in split_rows(values[name]):
                yield round_to(name, x, stored[name])
        else:
            own = torch.zeros_like(total)
            for x, value in zip(split_rows(values[name]), merged.pieces(name), strict=True):
                result = round_to(name, value, stored[name])
                own += _measure_losses(x, value, result)
                if not math.isfinite(own[0]):
                    raise CheckpointError(
                        f"{name} is not finite once it is merged: the adapter, or the base, holds "
                        "NaN or infinity; take an earlier one"
                    )
                yield result
            change, lost, _ = own.tolist()
            if change:
                report.changed[name] = _relative(lost, change)
                total.add_(own)

    write_tensors(report.output, specs, pieces)
    change, *losses = total.tolist()
    report.relative_error, report.relative_error_fp16 = (_relative(x, change) for x in losses)


def _read_adapters(
    base: Mapping[str, Tensor], pairs: Sequence[Source], hints: LegacyAdapterHints, force: bool
) -> list[tuple[Source, SavedAdapter]]:
    found, own = [], fingerprint(base)
    sources = [pair for pair in pairs if not is_state_file(pair[0])]
    for source in sources:
        folder, _ = source
        # hints for one of several adapters are for those that need some
        lacks_it = len(sources) == 1 or Path(folder).is_file()
        given = hints if lacks_it else None
        adapter = read_adapter(folder, given, base_fingerprint=own, force=force)
        found.append((source, adapter))
    return found


def _find_storage(
    adapters: Sequence[tuple[Source, SavedAdapter]], pairs: Sequence[Source]
) -> Storage | None:
    """How the base of all adapters and states was stored."""
    found = {str(folder): storage_of(x.note, folder) for (folder, _), x in adapters}
    for path, _ in pairs:
        # most states note nothing
        if is_state_file(path) and (storage := noted_storage(path)):
            found[str(path)] = storage
    if len(set(found.values())) > 1:
        forms = ", ".join(f"{n} on {x.name if x else 'dense weights'}" for n, x in found.items())
        raise ConfigError(
            f"these were trained on a base stored in several ways ({forms}): merge one, or those "
            "of one way"
        )
    return next(iter(found.values()), None)


def _take(
    base: Mapping[str, Tensor],
    adapters: Sequence[tuple[Source, SavedAdapter]],
    pairs: Sequence[Source],
    report: MergeReport,
    merge_base: MergeBase,
    force: bool,
) -> tuple[Mapping[str, Tensor], Storage | None, list[Addition], list[AsTrained]]:
    """What adapters are added to and how its projections are stored, they, and their checks."""
    storage = _find_storage(adapters, pairs)
    values: Mapping[str, Tensor] = base
    if storage:
        parts = [folder for (folder, _), x in adapters if x.note.get("init")]
        if merge_base == "trained" and parts and len(adapters) > 1:
            raise ConfigError(
                f"{parts[0]} began with a part of the base, of which the rest was stored: merge it "
                "alone, or with --merge_base original"
            )
        as_trained = BaseAsTrained(base, storage, adapters[0][1] if adapters else None)
        report.quant, report.merge_base = storage.name, merge_base
        report.quant_error = _measure_storage(base, as_trained)
        if merge_base == "trained":
            values = as_trained
        else:
            storage = None
    # on another base than that of training nothing is as it was trained
    is_as_trained = not force and report.merge_base == "trained"
    return values, storage, *_attach_adapters(base, adapters, storage, is_as_trained)


def _measure_storage(base: Mapping[str, Tensor], trained: BaseAsTrained) -> float:
    """What storing took from the weights, relative to them."""
    lost = total = 0.0
    for name in trained.stored:
        x = base[name].float()
        total += x.square().sum().item()
        lost += (trained[name].float() - x).square().sum().item()
    return _relative(lost, total)


def _attach_adapters(
    base: Mapping[str, Tensor],
    adapters: Sequence[tuple[Source, SavedAdapter]],
    storage: Storage | None,
    is_as_trained: bool,
) -> tuple[list[Addition], list[AsTrained]]:
    additions, checks = [], []
    for (folder, factor), adapter in adapters:
        check = AsTrained(adapter.note.get("trained", {}) if is_as_trained else {})
        model, attachment = attach_to_base(base, adapter, folder, storage)
        additions.append(Addition(model, attachment, factor, check.check))
        checks.append(check)
    return additions, checks


def _add_up_states(base: Mapping[str, Tensor], sources: Sequence[Source]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, factor in (source for source in sources if is_state_file(source[0])):
        for name, x in read_state(path, infer_model_config(base)).items():
            total[name] = total.get(name, torch.zeros_like(x)) + factor * x
    return total


def _build_adapter_model(
    base: Mapping[str, Tensor],
    merged: MergedWeights,
    additions: Sequence[Addition],
    states: Mapping[str, Tensor],
    storage: Storage | None,
) -> RWKV:
    """The model whose answers the merged file should give.

    For one adapter it computes by peft's own forward. For several, or one with a weight, peft has
    no forward: it is the base with the merged tensors before they are rounded.
    """
    is_one = [addition.weight for addition in additions] == [1]
    model = additions[0].model if is_one else build_mapped(base, storage)
    given = {n: x.float() for n, x in base.items() if n.endswith(STATE_SUFFIX)} | dict(states)
    if given:
        model.initial_state = model.version.state.to_state(given, model.model_config)
    return upcast_on_use(model) if is_one else upcast_on_use(model, merged)


def _map_whole(path: str | Path) -> RWKV:
    return upcast_on_use(build_mapped(read_weights(path)))


def _require_change(
    base: Mapping[str, Tensor],
    merged: MergedWeights,
    states: Mapping[str, Tensor],
    pairs: Sequence[Source],
) -> None:
    if any(bool(x.any()) for x in states.values()):
        return
    # the first tensor is enough: a trained adapter changes every tensor that it covers
    for name in (n for n in base if n in merged.names):
        for x, value in zip(split_rows(base[name]), merged.pieces(name), strict=True):
            if not torch.equal(value, x.float()):
                return
    names = ", ".join(str(source) for source, _ in pairs)
    raise CheckpointError(f"{names} changes nothing in the base: it was never trained")


def _measure_losses(base: Tensor, value: Tensor, stored: Tensor) -> Tensor:
    """Squares of a change, of what rounding took from it and of what fp16 would take, float64."""
    pairs = ((value, base), (stored, value), (value.half(), value))
    differences = [(x.float() - y.float()).flatten() for x, y in pairs]
    return torch.tensor([torch.dot(x, x).item() for x in differences], dtype=torch.float64)


def _relative(lost: float, change: float) -> float:
    """Norm of what was lost over that of the change, from their squares."""
    return math.sqrt(lost / change) if change else 0.0
