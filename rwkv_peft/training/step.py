"""One micro-batch: forward, loss and backward."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.loss import LossSums, head_loss
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import LayerState, RWKVState


class StepOutput(NamedTuple):
    """Sums over the trained tokens of one micro-batch.

    Attributes:
        loss_sum: (), cross-entropy in nats, each token by its loss weight; on the device, so that
            nobody waits for it during a step.
        num_tokens: trained tokens.
    """

    loss_sum: Tensor
    num_tokens: int


class Step(Protocol):
    """What `train()` does with a micro-batch; a researcher's own function may take its place."""

    def __call__(
        self,
        model: RWKV,
        batch: Batch,
        *,
        state: RWKVState | None,
        divisor: float,
        l2wrap: float,
        backward: Callable[[Tensor], None],
    ) -> StepOutput:
        """Computes the loss of a micro-batch and adds its gradient.

        Args:
            state: where the rows begin; the model's own start if None.
            divisor: loss weights of the whole optimizer step, at least one: the objective's sum
                over this micro-batch is divided by it.
            l2wrap: factor of the penalty on large logits.
            backward: adds the gradient of an objective (), which may be called more than once.
        """


def full_step(
    model: RWKV,
    batch: Batch,
    *,
    state: RWKVState | None = None,
    divisor: float = 1.0,
    l2wrap: float = 0.0,
    backward: Callable[[Tensor], None],
) -> StepOutput:
    """Takes whole rows through the model at once; see `Step`."""
    sums, _ = forward_loss(model, batch, state, l2wrap=l2wrap)
    backward(sums.objective / divisor)
    return StepOutput(sums.cross_entropy, batch.num_trained)


def forward_loss(
    model: RWKV, batch: Batch, state: RWKVState | None = None, *, l2wrap: float = 0.0
) -> tuple[LossSums, list[LayerState]]:
    """Loss sums of a micro-batch, and the layers' states after its last tokens."""
    device = model.emb.weight.device
    # picked on the host: positions without a loss never meet the head
    trained = (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)
    targets = copy_to(batch.targets.flatten()[trained], device)
    weights = None if batch.weights is None else copy_to(batch.weights.flatten()[trained], device)
    segment_ids = None if batch.segment_ids is None else copy_to(batch.segment_ids, device)
    hidden, layers = model.hidden(copy_to(batch.tokens, device), state, segment_ids=segment_ids)
    rows = hidden.flatten(0, 1)[copy_to(trained, device)]
    return head_loss(model.head, rows, targets, weights=weights, l2wrap=l2wrap), layers


def copy_to(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, in a copy that the host does not wait for."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)
