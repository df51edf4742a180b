"""The loss of a model on documents, without training."""

from collections.abc import Callable

import torch

from rwkv_peft.data.batching import Batch, Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState
from rwkv_peft.training.step import forward_loss


@torch.no_grad()
def evaluate_loss(
    model: RWKV,
    documents: Documents,
    *,
    initial_state: Callable[[Batch], RWKVState | None] = lambda batch: None,
    ctx_len: int = 1024,
    micro_bsz: int = 8,
) -> tuple[float, float]:
    """Summed cross-entropy in nats over whole documents, and the loss weights it is a sum over.

    Args:
        initial_state: where the rows of a batch begin, such as `TrainTarget.initial_state`; the
            model's own start if it gives None.
        ctx_len: tokens of a row that go through the model at once. Longer documents go through in
            windows that carry the state on, so that the result does not depend on it.
        micro_bsz: documents at once.
    """
    batches = Batches(
        documents,
        dataload="pad",
        ctx_len=max(documents.longest, 1),
        micro_bsz=micro_bsz,
        seed=0,
        is_shuffled=False,
    )
    was_training = model.training
    model.eval()
    total, weight = 0.0, 0.0
    for batch in map(batches.__getitem__, range(len(batches))):
        total += _loss_of_rows(model, batch, initial_state(batch), ctx_len)
        weight += batch.weight
    model.train(was_training)
    return total, weight


def _loss_of_rows(model: RWKV, batch: Batch, state: RWKVState | None, ctx_len: int) -> float:
    total = 0.0
    for start in range(0, batch.tokens.shape[1], ctx_len):
        window = slice(start, start + ctx_len)
        weights = None if batch.weights is None else batch.weights[:, window]
        part = batch._replace(
            tokens=batch.tokens[:, window], targets=batch.targets[:, window], weights=weights
        )
        sums, layers = forward_loss(model, part, state)
        state = RWKVState.from_layers(layers)
        total += sums.cross_entropy.item()
    return total
