"""One micro-batch through a model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.loss import head_loss
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import LayerState, RWKVState


class StepOutput(NamedTuple):
    """Sums over the trained tokens of one micro-batch.

    Attributes:
        objective_sum: what is minimised; divided by the tokens of the whole optimizer step.
        loss_sum: cross-entropy in nats, for the log.
        num_tokens: trained tokens.
        state: the layers' states after the last token.
    """

    objective_sum: Tensor
    loss_sum: Tensor
    num_tokens: int
    state: list[LayerState]


Step = Callable[..., StepOutput]


def full_step(
    model: RWKV, batch: Batch, state: RWKVState | None = None, *, l2wrap: float = 0.0
) -> StepOutput:
    """Forward and loss of a whole micro-batch at once."""
    device = model.emb.weight.device
    # picked on the host: positions without a loss never meet the head
    trained = (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)
    targets = batch.targets.flatten()[trained].to(device)
    hidden, layers = model.hidden(batch.tokens.to(device), state)
    rows = hidden.flatten(0, 1)[trained.to(device)]
    objective, cross_entropy = head_loss(model.head, rows, targets, l2wrap=l2wrap)
    return StepOutput(objective, cross_entropy, len(trained), layers)


@torch.no_grad()
def evaluate_loss(model: RWKV, batches: list[Batch]) -> tuple[float, int]:
    """Summed cross-entropy in nats over batches, and the number of tokens predicted."""
    was_training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in batches:
        output = full_step(model, batch)
        total += output.loss_sum.item()
        num_tokens += output.num_tokens
    model.train(was_training)
    return total, num_tokens
