"""What ends a run in the middle: a step from which nothing can be learned."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from rwkv_peft.data.batching import Batch, Batches
from rwkv_peft.errors import TrainingError
from rwkv_peft.training.settings import Settings


def require_finite_step(
    batches: Batches,
    window: range,
    losses: Sequence[float],
    grad_norm: float,
    step: int,
    settings: Settings,
) -> None:
    """Raises TrainingError if a loss or the gradient of a step is not finite.

    With fp16's loss scaling a gradient may be infinite now and then.

    Args:
        window: positions of its micro-batches, of all ranks.
        losses: of these.
        step: its number, from 1.
    """

    def fail(what: str, lines: list[int]) -> TrainingError:
        return TrainingError(
            f"{what} at step {step}, in the rows from lines {', '.join(map(str, lines))} of "
            f"{settings.data_file}: nothing of this step was learned. Try a lower --lr_init, or "
            "--precision bf16 in place of fp16"
        )

    for position, loss in zip(window, losses, strict=True):
        if not math.isfinite(loss):
            raise fail(f"the loss is {loss}", batches[position].lines)
    if not math.isfinite(grad_norm) and settings.dtype != torch.float16:
        lines = [line for position in window for line in batches[position].lines]
        raise fail(f"the gradient is {grad_norm}", lines)


@contextmanager
def lack_in_one_line(batch: Batch, step: int, settings: Settings) -> Iterator[None]:
    """Makes a TrainingError of a micro-batch for which memory is out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, width = batch.tokens.shape
        raise TrainingError(
            f"out of memory at step {step}, with {rows} rows of {width} tokens: "
            f"use --grad_cp {min(settings.grad_cp + 1, 2)}, or a smaller --micro_bsz "
            "(with a larger --accumulate_grad_batches) "
            f"or --{'chunk_ctx' if settings.is_infctx else 'ctx_len'}"
        ) from error


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
