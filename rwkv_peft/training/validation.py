"""Evaluation while training: what is evaluated, what was found, and when it is enough."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from rwkv_peft.data.batching import Batch, Batches, load, share
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.models.base import RWKV
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.training.choose import Plan
from rwkv_peft.training.evaluate import evaluate_batches, undisturbed
from rwkv_peft.training.samples import Prompt, read_prompts, sample
from rwkv_peft.training.settings import Facts
from rwkv_peft.training.target import TrainTarget


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, as a line of val_data.jsonl.

    Attributes:
        step: optimizer steps before it.
        loss: cross-entropy in nats, the mean over the trained tokens by their weights; None if it
            is no finite number.
        perplexity: of a trained token.
        bits_per_byte: over the bytes of the trained tokens; None if these are not known.
        tokens: trained tokens.
        is_best: whether no evaluation after a step was better so far.
        t_cost: seconds.
    """

    step: int
    epoch: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int
    is_best: bool
    t_cost: float


class Sample(NamedTuple):
    """An answer, as a line of val_samples.jsonl."""

    step: int
    epoch: int
    state: str
    prompt: str
    text: str


class Validation:
    """Documents and prompts to evaluate on, and the evaluations so far.

    Attributes:
        evaluations: all of the run, in their order.
    """

    def __init__(
        self,
        plan: Plan,
        documents: Documents | None,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        states: Sequence[str] = (),
        strategy: Strategy | None = None,
    ) -> None:
        """Lays the documents out and cuts them as those of training are.

        Args:
            documents: None if there are prompts alone.
            states: names of the states that are trained; () if they have none.
            strategy: by which ranks share the documents; None: this one has all.
        """
        self._strategy = strategy or Strategy()
        self._settings, self._prompts, self._states = plan.settings, prompts, states
        self.documents = documents
        self._batches = _lay_out(plan.batches, documents) if documents else None
        self._token_sizes = None if tokenizer.is_foreign else tokenizer.token_sizes
        self.evaluations: list[Evaluation] = []
        self._last_step = -1

    def is_due(self, step: int, *, is_epoch_end: bool) -> bool:
        """Whether an evaluation belongs after so many steps, and was not made."""
        every = self._settings.val_every_steps
        return step != self._last_step and (
            not step or is_epoch_end or (every > 0 and step % every == 0)
        )

    @property
    def best(self) -> Evaluation | None:
        """The evaluation after a step that no later one was better than."""
        return next((x for x in reversed(self.evaluations) if x.is_best), None)

    @property
    def is_enough(self) -> bool:
        """Whether evaluations have ceased to become better for as long as the user waits."""
        patience, best = self._settings.early_stopping_patience, self.best
        if not patience or not self.evaluations:
            return False
        since = [x for x in self.evaluations if x.step > (best.step if best else 0)]
        return len(since) >= patience

    def evaluate(
        self, model: RWKV, target: TrainTarget, step: int, epoch: int
    ) -> tuple[Evaluation | None, list[Sample]]:
        """Evaluates a model as it is after `step` steps, and notes that."""
        self._last_step = step
        found = None
        if self._batches is not None:
            found = self._measure(model, target, step, epoch)
            self.evaluations.append(found)
        together = self._strategy if self._strategy.shares_model else None
        with undisturbed(model):
            samples = [
                Sample(step, epoch, name, prompt.shown, text)
                for name in self._states or [""]
                for prompt, text in zip(
                    self._prompts,
                    sample(
                        model,
                        self._prompts,
                        target.initial_state(one_row(name)),
                        strategy=together,
                    ),
                    strict=True,
                )
            ]
        return found, samples

    def state_dict(self) -> dict[str, Any]:
        """All that later evaluations depend on, as plain numbers, texts and lists."""
        return {
            "last_step": self._last_step,
            "evaluations": [asdict(x) for x in self.evaluations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._last_step = state["last_step"]
        self.evaluations = [Evaluation(**x) for x in state["evaluations"]]

    def _measure(self, model: RWKV, target: TrainTarget, step: int, epoch: int) -> Evaluation:
        assert self._batches is not None
        started, batches, best = time.perf_counter(), self._batches, self.best
        turns = share(range(len(batches)), self._strategy.rank, self._strategy.size)
        own_batches = load(batches, turns)
        if self._settings.is_infctx and self._strategy.shares_model:
            # blocks are gathered by all together, as often on each
            own_batches = (
                x.lengthened(max(self._strategy.exchange(x.tokens.shape[1]))) for x in own_batches
            )
        own = evaluate_batches(
            model,
            own_batches,
            initial_state=target.initial_state,
            window=self._settings.chunk_ctx if self._settings.is_infctx else 0,
            token_sizes=self._token_sizes,
        )
        totals = own.of_all(self._strategy.sum)
        loss = totals.loss if math.isfinite(totals.loss) else None
        is_better = best is None or best.loss is None or (loss is not None and loss < best.loss)
        return Evaluation(
            step=step,
            epoch=epoch,
            loss=loss,
            perplexity=None if loss is None or totals.perplexity == math.inf else totals.perplexity,
            bits_per_byte=None if loss is None else totals.bits_per_byte,
            tokens=totals.num_tokens,
            is_best=step > 0 and loss is not None and is_better,
            t_cost=time.perf_counter() - started,
        )


def _lay_out(trained: Batches, documents: Documents) -> Batches:
    """Batches of the shapes of training, so that nothing is compiled for them."""
    return Batches(
        documents,
        dataload=trained.dataload,
        ctx_len=trained.ctx_len,
        micro_bsz=trained.micro_bsz,
        seed=0,
        # shuffled, rows of like lengths come together; windows begin with the first document
        is_shuffled=trained.dataload != "get",
        keeps_width=True,
    )


def one_row(state: str) -> Batch:
    """A batch of one row that begins in the state of this name."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(token, token, [], states=[state] if state else None)


def make_validation(plan: Plan, facts: Facts, strategy: Strategy) -> Validation | None:
    """What a run evaluates while it trains, None if that is nothing.

    Ranks share the documents; rank 0 alone answers prompts, unless it has a part of the model.
    """
    settings, tokenizer = plan.settings, Tokenizer(facts.model_config.vocab_size)
    answers = strategy.rank == 0 or strategy.shares_model
    prompts = read_prompts(settings, tokenizer) if answers else []
    if facts.held_out is None and not prompts:
        return None
    states = sorted(facts.documents.names) if settings.peft == "state" else []
    return Validation(plan, facts.held_out, prompts, tokenizer, states, strategy)
