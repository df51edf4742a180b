"""Merging: an official file with adapters and learned states added, and what rounding lost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import attach_values, read_adapter, require_base
from rwkv_peft.checkpoint.files import atomic_write
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.pth import STATE_SUFFIX, geometry_of, load_weights, read_weights
from rwkv_peft.checkpoint.state import is_state_file, read_state
from rwkv_peft.checkpoint.stream import Spec, write_tensors
from rwkv_peft.device import dtype_of
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.merge import Addition, MergedWeights
from rwkv_peft.models import build

StoredType = Literal["keep", "bf16", "fp16", "fp32"]
# a change of which rounding takes more than this is worth another type
TOLERABLE = 0.05


@dataclass(slots=True)
class MergeReport:
    """What a merge did, as in merge_report.json.

    Attributes:
        relative_error: norm of what rounding to the stored type took from the learned change, over
            the norm of the change; of all tensors together.
        relative_error_fp16: the same if the changed tensors were stored as fp16.
        changed: names of the tensors with a change, and the relative error of each.
        states: how many tensors of learned states were added.
    """

    base_model: str
    adapters: list[str]
    weights: list[float]
    output: str
    dtype: str
    relative_error: float = 0.0
    relative_error_fp16: float = 0.0
    changed: dict[str, float] = field(default_factory=dict)
    states: int = 0

    @property
    def is_lossy(self) -> bool:
        """Whether rounding took more of the learned change than is tolerable."""
        return self.relative_error > TOLERABLE

    def lines(self) -> tuple[str, str]:
        """Rounding and recommendation, for a person."""
        first = f"rounding: {len(self.changed)} tensors changed"
        if self.changed:
            first += f"; storing them as {self.dtype} loses {self.relative_error:.2%} of the change"
        if self.states:
            first += f"; {self.states} tensors of a learned state added"
        return first, "recommendation: " + self.recommendation()

    def recommendation(self) -> str:
        """What to do where rounding took too much, or that there is nothing to do."""
        if not self.is_lossy:
            return "use the merged file; it holds what was learned"
        if self.relative_error_fp16 < self.relative_error / 2:
            return (
                f"merge again with --dtype fp16, which loses {self.relative_error_fp16:.2%}, or "
                "use the adapter unmerged"
            )
        return "use the adapter unmerged, or merge with --dtype fp32"

    def write(self) -> Path:
        """Writes merge_report.json beside the output."""
        path = Path(self.output).with_name("merge_report.json")
        with atomic_write(path, "w") as file:
            json.dump({**asdict(self), "recommendation": self.recommendation()}, file, indent=2)
        return path


def merge(
    base_model: str | Path,
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] = (),
    dtype: StoredType = "keep",
    force: bool = False,
) -> MergeReport:
    """Writes `output`: the official file `base_model` with adapters or learned states added.

    The sums are float32 and rounded once; tensors without a change keep their bits, if they keep
    their type, and the file its order. One tensor is in memory at a time.

    Args:
        adapter: a folder in peft's format or a state file, or several of them.
        weights: with which the change of each is added; 1 if left out.
        dtype: of the file's tensors; 'keep' leaves each as in the base.
        force: add an adapter that was trained on another base.
    Raises:
        CheckpointError: a file cannot be read or written, an adapter does not fit the base or
            changes nothing, or fp16 cannot hold a value.
    """
    sources = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    factors = list(weights) or [1.0] * len(sources)
    if len(factors) != len(sources):
        raise ConfigError(f"{len(sources)} adapters came with {len(factors)} weights")
    base = read_weights(base_model)
    states = _states(base, [(s, f) for s, f in zip(sources, factors, strict=True)])
    merged = _adapters(base, [(s, f) for s, f in zip(sources, factors, strict=True)], force)
    stored = {n: x.dtype if dtype == "keep" else dtype_of(dtype) for n, x in base.items()}
    specs = {n: Spec(tuple(x.shape), stored[n]) for n, x in base.items()}
    specs |= {n: Spec(tuple(x.shape), torch.float32) for n, x in states.items()}
    _require_change(base, merged, states, sources)
    kinds = sorted({str(stored[n]).removeprefix("torch.") for n in merged.names})
    names = [str(s) for s in sources]
    report = MergeReport(str(base_model), names, factors, str(output), " and ".join(kinds))
    report.states = len(states)
    sums = _Sums()

    def tensor(name: str) -> Tensor:
        if name in states:
            return states[name]
        if name not in merged.names:
            return _stored(name, base[name], stored[name])
        value = merged.tensor(name)
        result = _stored(name, value, stored[name])
        if error := sums.add(base[name], value, result):
            report.changed[name] = error[0]
        return result

    write_tensors(output, specs, tensor)
    report.relative_error, report.relative_error_fp16 = sums.relative()
    return report


def _stored(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    result = x.to(dtype)
    if dtype == torch.float16 and not bool(result.isfinite().all()):
        raise CheckpointError(f"{name} does not fit into fp16: use --dtype bf16 or fp32")
    return result


def _adapters(
    base: Mapping[str, Tensor], sources: Sequence[tuple[str | Path, float]], force: bool
) -> MergedWeights:
    additions, own = [], fingerprint(base)
    official = {name: x for name, x in base.items() if not name.endswith(STATE_SUFFIX)}
    for folder, factor in sources:
        if is_state_file(folder):
            continue
        adapter = read_adapter(folder)
        require_base(folder, adapter, own, force=force)
        model = build(geometry_of(base), op="reference")
        # the parameters are the file's own memory, so that a model costs none
        load_weights(model, official, dtype=None)
        attachment = attach_values(model, adapter, folder, keeps_float32=True)
        additions.append(Addition(model, attachment, factor))
    return MergedWeights(base, additions)


def _states(
    base: Mapping[str, Tensor], sources: Sequence[tuple[str | Path, float]]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, factor in sources:
        if is_state_file(path):
            for name, x in read_state(path, geometry_of(base)).items():
                total[name] = total.get(name, torch.zeros_like(x)) + factor * x
    return total


def _require_change(
    base: Mapping[str, Tensor],
    merged: MergedWeights,
    states: Mapping[str, Tensor],
    sources: Sequence[str | Path],
) -> None:
    if any(bool(x.any()) for x in states.values()):
        return
    # an adapter that was trained has changed the first tensor that it may
    if any(not torch.equal(merged.tensor(n), base[n].float()) for n in base if n in merged.names):
        return
    names = ", ".join(map(str, sources))
    raise CheckpointError(f"{names} changes nothing in the base: it was never trained")


class _Sums:
    """Squares of the learned change and of what rounding takes from it."""

    def __init__(self) -> None:
        self._change = self._lost = self._lost_fp16 = 0.0

    def add(self, base: Tensor, value: Tensor, stored: Tensor) -> list[float]:
        """The tensor's own relative error, or nothing if it has no change."""
        change = _square(value, base)
        if not change:
            return []
        lost = _square(stored, value)
        self._change += change
        self._lost += lost
        self._lost_fp16 += _square(value.half(), value)
        return [math.sqrt(lost / change)]

    def relative(self) -> tuple[float, float]:
        """Of all tensors together, as stored and as fp16."""
        if not self._change:
            return 0.0, 0.0
        return math.sqrt(self._lost / self._change), math.sqrt(self._lost_fp16 / self._change)


def _square(x: Tensor, y: Tensor) -> float:
    """Squared norm of x - y with a million differences in memory at a time."""
    pairs = zip(x.reshape(-1).split(1 << 20), y.reshape(-1).split(1 << 20), strict=True)
    squares = [(a.float() - b.float()).square().sum(dtype=torch.float64).item() for a, b in pairs]
    return math.fsum(squares)
