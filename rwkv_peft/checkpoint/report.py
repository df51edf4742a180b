"""What a merge did, and what it advises."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from rwkv_peft.checkpoint.compare import Comparison
from rwkv_peft.methods.sketch import AsTrained
from rwkv_peft.writing import atomic_file

# what an adapter is added to, where its base was stored in 8 or 4 bits
MergeBase: TypeAlias = Literal["trained", "original"]
# a change of which rounding takes more than this is worth another type
TOLERABLE = 0.05
# name of what a merge writes beside its output
REPORT = "merge_report.json"


@dataclass(slots=True)
class MergeReport:
    """What a merge did, as in merge_report.json.

    Attributes:
        relative_error: norm of what rounding to the stored type took from the learned change, over
            the norm of the change; of all tensors together.
        relative_error_fp16: the same if the changed tensors were stored as fp16.
        changed: names of the tensors with a change, and the relative error of each.
        states: how many tensors of learned states were added.
        comparison: of the merged file's answers with the adapter model's; None if none was made.
        as_trained: how many merged tensors were compared with what their layers computed when the
            adapters were saved; 0 if the adapters do not tell.
        as_trained_error: the largest difference found, relative to the tensor.
        quant: how the base was stored in training.
        quant_error: norm of what that took from its projections, over their norm.
        merge_base: whether the adapters were added to the base as trained, or to the original.
    """

    base_model: str
    adapters: list[str]
    weights: list[float]
    output: str
    dtype: str
    version: str
    relative_error: float = 0.0
    relative_error_fp16: float = 0.0
    changed: dict[str, float] = field(default_factory=dict)
    states: int = 0
    comparison: Comparison | None = None
    as_trained: int = 0
    as_trained_error: float = 0.0
    quant: str = "none"
    quant_error: float = 0.0
    merge_base: MergeBase = "trained"

    @property
    def is_lossy(self) -> bool:
        """Whether rounding took more of the learned change than is tolerable."""
        return self.relative_error > TOLERABLE

    def lines(self) -> tuple[str, str, str]:
        """Rounding, comparison and recommendation, for a person."""
        first = f"rounding: {len(self.changed)} tensors changed"
        if self.changed:
            first += f"; storing them as {self.dtype} loses {self.relative_error:.2%} of the change"
        if self.states:
            first += f"; {self.states} tensors of a learned state added"
        if self.quant != "none":
            chosen = "as it was trained" if self.merge_base == "trained" else "as in its file"
            first += (
                f"; the base was trained as {self.quant}, {self.quant_error:.2%} from its file, "
                f"and is taken {chosen} (--merge_base {self.merge_base})"
            )
        second = "not made" if self.comparison is None else self.comparison.describe()
        if self.as_trained:
            second += (
                f"; {self.as_trained} merged tensors are what their layers computed as they were "
                f"trained, to {self.as_trained_error:.1g}"
            )
        elif self.changed and self.adapters:
            second += "; what the layers computed as they were trained is not known, or not asked"
        return first, f"comparison: {second}", f"recommendation: {self.recommendation()}"

    def recommendation(self) -> str:
        """What to do where too much was lost, or that there is nothing to do."""
        is_far = self.comparison is not None and self.comparison.is_far
        if not self.is_lossy and not is_far:
            advice = "use the merged file; it holds what was learned"
            if self.states and self.version == "x070":
                advice += ". Programs that read no state from an RWKV-7 file need the state's own"
            return advice
        if self.relative_error_fp16 < self.relative_error / 2:
            advice = (
                f"merge again with --dtype fp16, which loses {self.relative_error_fp16:.2%}, or "
                "use the adapter unmerged"
            )
        else:
            advice = "use the adapter unmerged, or merge with --dtype fp32"
        if self.comparison is not None and not is_far:
            advice += "; on the text compared, the answers are still close"
        return advice

    def note(self, checks: Sequence[AsTrained]) -> None:
        """Takes the figures of finished comparisons with layers as they were trained."""
        self.as_trained = sum(len(check.compared) for check in checks)
        self.as_trained_error = max((check.worst for check in checks), default=0.0)

    def write(self) -> Path:
        """Writes merge_report.json beside the output."""
        path = Path(self.output).with_name(REPORT)
        with atomic_file(path, "w") as file:
            json.dump({**asdict(self), "recommendation": self.recommendation()}, file, indent=2)
        return path
