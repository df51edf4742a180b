"""One micro-batch through a model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_peft.data.batching import IGNORE, Batch, Batches
from rwkv_peft.data.prepare import Documents
from rwkv_peft.loss import head_loss
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import LayerState, RWKVState


class StepOutput(NamedTuple):
    """Sums over the trained tokens of one micro-batch, each by its weight.

    Attributes:
        objective_sum: what is minimised; divided by the weights of the whole optimizer step.
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
    weights = None if batch.weights is None else batch.weights.flatten()[trained].to(device)
    segment_ids = None if batch.segment_ids is None else batch.segment_ids.to(device)
    hidden, layers = model.hidden(batch.tokens.to(device), state, segment_ids=segment_ids)
    rows = hidden.flatten(0, 1)[trained.to(device)]
    objective, cross_entropy = head_loss(model.head, rows, targets, weights=weights, l2wrap=l2wrap)
    return StepOutput(objective, cross_entropy, len(trained), layers)


@torch.no_grad()
def evaluate_loss(model: RWKV, documents: Documents) -> tuple[float, float]:
    """Summed cross-entropy in nats over whole documents, and the tokens predicted.

    Each token counts by its weight.
    """
    batches = Batches(
        documents,
        dataload="pad",
        ctx_len=documents.longest,
        micro_bsz=8,
        seed=0,
        is_shuffled=False,
    )
    was_training = model.training
    model.eval()
    total, weight = 0.0, 0.0
    for batch in map(batches.__getitem__, range(len(batches))):
        total += full_step(model, batch).loss_sum.item()
        weight += batch.weight
    model.train(was_training)
    return total, weight
