"""The loss of a model on documents, without training."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_peft.data.batching import IGNORE, Batch, Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState
from rwkv_peft.training.infctx import cut_window, find_restarts
from rwkv_peft.training.progress import RandomGenerators
from rwkv_peft.training.step import forward_loss

InitialState = Callable[[Batch], RWKVState | None]


@dataclass(frozen=True, slots=True)
class LossTotals:
    """Sums over the tokens that carry a loss.

    Attributes:
        cross_entropy: in nats, each token by its loss weight.
        weight: of these weights.
        num_tokens: of these tokens.
        num_bytes: of their texts, each by its weight; 0 if these are not known.
    """

    cross_entropy: float
    weight: float
    num_tokens: int = 0
    num_bytes: float = 0.0

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a token in nats."""
        return self.cross_entropy / (self.weight or 1.0)

    @property
    def perplexity(self) -> float:
        """Of a token; infinite where no float is as large."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Cross-entropy in bits for each byte of the text that carries it; None without bytes."""
        return self.cross_entropy / math.log(2) / self.num_bytes if self.num_bytes else None

    def of_all(self, add_up: Callable[[Sequence[float]], list[float]]) -> "LossTotals":
        """Those of all ranks, by a function that sums numbers over ranks."""
        values = add_up([self.cross_entropy, self.weight, self.num_tokens, self.num_bytes])
        return LossTotals(values[0], values[1], int(values[2]), values[3])


@contextmanager
def undisturbed(model: RWKV) -> Iterator[None]:
    """Work with a model that changes nothing of its training: no gradients, dropout or draws."""
    was_training, generators = model.training, RandomGenerators(model.emb.weight.device)
    drawn = generators.state_dict()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        generators.load_state_dict(drawn)


def evaluate_batches(
    model: RWKV,
    batches: Iterable[Batch],
    *,
    initial_state: InitialState = lambda batch: None,
    window: int = 0,
    token_sizes: NDArray[np.int64] | None = None,
) -> LossTotals:
    """Sums of the loss over batches; training goes on as if there had been none.

    Args:
        initial_state: where the rows of a batch begin, such as `TrainTarget.initial_state`; the
            model's own start if it gives None.
        window: tokens of a row that go through the model at once, the state carried on; 0: all.
        token_sizes: (V,) bytes of the text of each token.
    """
    losses: list[Tensor] = []
    weight, num_tokens, num_bytes = 0.0, 0, 0.0
    with undisturbed(model):
        for batch in batches:
            losses += _losses_of_rows(model, batch, initial_state(batch), window)
            is_trained = batch.targets != IGNORE
            weights = None if batch.weights is None else batch.weights[is_trained].double().numpy()
            weight, num_tokens = weight + batch.weight, num_tokens + batch.num_trained
            if token_sizes is not None:
                sizes = token_sizes[batch.targets[is_trained].numpy()]
                num_bytes += float(sizes.sum() if weights is None else sizes @ weights)
    # the one wait for the device
    total = math.fsum(torch.stack(losses).tolist()) if losses else 0.0
    return LossTotals(total, weight, num_tokens, num_bytes)


def evaluate_loss(
    model: RWKV,
    documents: Documents,
    *,
    initial_state: InitialState = lambda batch: None,
    ctx_len: int = 1024,
    micro_bsz: int = 8,
) -> tuple[float, float]:
    """Summed cross-entropy in nats over whole documents, and the loss weights it is a sum over.

    Args:
        initial_state: where the rows of a batch begin; see `evaluate_batches`.
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
    taken = map(batches.__getitem__, range(len(batches)))
    totals = evaluate_batches(model, taken, initial_state=initial_state, window=ctx_len)
    return totals.cross_entropy, totals.weight


def _losses_of_rows(
    model: RWKV, batch: Batch, state: RWKVState | None, window: int
) -> list[Tensor]:
    width = batch.tokens.shape[1]
    window = window or width
    losses = []
    for start in range(0, width, window):
        if state is not None:
            restarts = find_restarts(batch.segment_ids, start, state.wkv.device)
            state = state if restarts is None else state.restart(restarts)
        part = cut_window(batch, slice(start, start + window))
        sums, layers = forward_loss(model, part, state)
        losses.append(sums.cross_entropy)
        state = RWKVState.from_layers(layers) if start + window < width else None
    return losses
