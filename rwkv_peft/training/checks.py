"""What ends a run in the middle: a step from which nothing can be learned."""

import math
from collections.abc import Collection, Sequence

import torch

from rwkv_peft.data.batching import Batch
from rwkv_peft.errors import TrainingError
from rwkv_peft.training.settings import Settings


def require_finite_step(
    batches: Sequence[Batch],
    losses: Sequence[float],
    grad_norm: float,
    step: int,
    settings: Settings,
) -> None:
    """Raises TrainingError if a loss or the gradient of a step is not finite.

    With fp16's loss scaling a gradient may be infinite now and then.

    Args:
        losses: of its micro-batches.
        step: its number, from 1.
    """

    def fail(what: str, lines: list[int]) -> TrainingError:
        return TrainingError(
            f"{what} at step {step}, in the rows from lines {', '.join(map(str, lines))} of "
            f"{settings.data_file}: nothing of this step was learned. Try a lower --lr_init, or "
            "--precision bf16 in place of fp16"
        )

    for batch, loss in zip(batches, losses, strict=True):
        if not math.isfinite(loss):
            raise fail(f"the loss is {loss}", batch.lines)
    if not math.isfinite(grad_norm) and settings.dtype != torch.float16:
        lines = [line for batch in batches for line in batch.lines]
        raise fail(f"the gradient is {grad_norm}", lines)


def require_gradient(names: Collection[str]) -> None:
    """Ends a run in whose first step no trained tensor got a gradient: it would learn nothing."""
    # rows of an embedding have one in the steps in which their tokens occur
    names = [name for name in names if "trainable_tokens" not in name]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise TrainingError(
            f"the gradient of the first step is zero: {', '.join(names[:3])}{more} got none, and "
            "nothing would be learned. Try other --peft_config or --train_parts"
        )
