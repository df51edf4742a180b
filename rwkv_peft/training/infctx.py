"""Rows of any length in the memory of one chunk: gradients truncated at borders, or exact.

A row is cut into chunks, which hand the state on: the operator's in float32, and both token shifts.
Backward works on a group of chunks at a time. They go forward without a graph, and the states at
the borders between them are kept; only the last goes forward with a graph, and backward. Then, from
the last but one to the first, each goes forward again from the state at its beginning, with a
graph, and backward from its own loss and from the gradient of the state that it hands on. So a
gradient ends where a group begins; if all chunks of a row are one group, it is exact.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise, zip_longest

import torch
from torch import Tensor

from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.models.base import RWKV
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.state import RWKVState
from rwkv_peft.training.borders import (
    Borders,
    BorderSizes,
    Pinned,
    Room,
    count_passes,
    least_room,
    split,
)
from rwkv_peft.training.chunks import Chunks, Task, stack
from rwkv_peft.training.progress import RandomGenerators
from rwkv_peft.training.step import StepOutput, copy_to, forward_loss

NO_LIMIT = Room(1 << 62, 1 << 62)


class InfctxStep:
    """A `Step` that takes rows through the model in chunks.

    Attributes:
        chunk_ctx: tokens of a chunk; the last of a row may have fewer.
        bptt_chunks: chunks of a group, over which gradients go back; None: all of a row.
        room: memory for the states at the borders of a group.
        way: takes a chunk through the model.
        pinned: memory of the host for states at borders.
        after_chunk: called whenever a chunk has gone forward, and backward where it does, with how
            often one has in this micro-batch, and how often one will have.
    """

    def __init__(
        self,
        chunk_ctx: int,
        bptt_chunks: int | None = 1,
        *,
        room: Room = NO_LIMIT,
        way: Chunks | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        """Makes it for one rank; of several that share a model, all take as many chunks."""
        self.chunk_ctx, self.bptt_chunks, self.room = chunk_ctx, bptt_chunks, room
        self.strategy = strategy or Strategy()
        self.way, self.pinned = way or Chunks(), Pinned()
        self.after_chunk: Callable[[int, int], None] = lambda done, total: None

    def __call__(
        self,
        model: RWKV,
        batch: Batch,
        *,
        state: RWKVState | None = None,
        divisor: float = 1.0,
        l2wrap: float = 0.0,
        backward: Callable[[Tensor], None],
    ) -> StepOutput:
        """Takes rows through the model chunk by chunk; see `Step`."""
        task = Task(True, None, False, divisor, l2wrap, backward)
        return StepOutput(_Row(self, model, batch, task).learn(state), batch.num_trained)


class _Row:
    """One micro-batch on its way through the model."""

    def __init__(
        self,
        step: InfctxStep,
        model: RWKV,
        batch: Batch,
        task: Task,
    ) -> None:
        self._model, self._way, self._task = model, step.way, task
        device, rows = model.emb.weight.device, len(batch.tokens)
        is_trained = (batch.targets != IGNORE).any(0)
        has_loss = [bool(part.any()) for part in is_trained.split(step.chunk_ctx)]
        room = BorderSizes(model.model_config, rows, model.emb.weight.dtype, device).count(
            step.room
        )
        if step.strategy.shares_model:
            # blocks are gathered by all together
            found = step.strategy.exchange((has_loss, room))
            has_loss = [any(x) for x in zip_longest(*(losses for losses, _ in found))]
            room = min(room for _, room in found)
            batch = batch.lengthened((len(has_loss) - 1) * step.chunk_ctx + 1)
        # what stands behind the last chunk with a loss has no part in it
        count = max((i for i, x in enumerate(has_loss) if x), default=0) + 1
        starts = range(0, count * step.chunk_ctx, step.chunk_ctx)
        self._chunks = [cut_window(batch, slice(at, at + step.chunk_ctx)) for at in starts]
        self._has_loss = has_loss
        self._restarts = [find_restarts(batch.segment_ids, at, device) for at in starts]
        self._group = step.bptt_chunks or count
        self._room = max(least_room(min(self._group, count)), room)
        self._borders = Borders(step.room.device, step.pinned)
        self._random = RandomGenerators(device)
        self._loss = torch.zeros((), device=device)
        # of the state that the next chunk to go backward hands on; None: the gradient ends there
        self._handed_back: RWKVState | None = None
        self._after_chunk, self._done = step.after_chunk, 0

    def learn(self, state: RWKVState | None) -> Tensor:
        """Adds the gradient of all chunks; gives the summed loss ()."""
        count = len(self._chunks)
        has_weights = any(p.requires_grad for p in self._model.parameters())
        groups = []
        for start in range(0, count, self._group):
            end = min(start + self._group, count)
            is_learned = has_weights or (start == 0 and _has_graph(state))
            trained = [i for i in range(start, end) if self._has_loss[i]]
            # without a loss in the whole row its gradient is zero, which is not no gradient
            last = trained[-1] if trained else start if count == 1 else start - 1
            groups.append((start, last + 1 if is_learned else start, end))
        self._total = sum(
            (count_passes(middle - start, self._room) if middle > start else 0) + end - middle
            for start, middle, end in groups
        )
        for start, middle, end in groups:
            if middle > start:
                self._start, self._handed_back = start, None
                self._learn(start, middle, state, self._room)
                state = self._state
            state = self._go_on(middle, end, state, is_logged=True)
        return self._loss

    def _learn(self, start: int, end: int, state: RWKVState | None, room: int) -> None:
        """Adds the gradient of some chunks of a group.

        Leaves the random generators as they are after the last of these chunks went forward.
        """
        if end - start == 1:
            self._learn_chunk(start, state)
            return
        parts = list(pairwise(accumulate(split(end - start, room), initial=start)))
        random_states = []
        for part in parts[:-1]:
            self._borders.push(state)
            random_states.append(self._random.state_dict())
            state = self._go_on(*part, state)
        self._learn(*parts[-1], state, room)
        random_state = self._random.state_dict()
        for part in reversed(parts[:-1]):
            self._random.load_state_dict(random_states.pop())
            self._learn(*part, self._borders.pop(), room - len(random_states))
        self._random.load_state_dict(random_state)

    def _learn_chunk(self, i: int, state: RWKVState | None) -> None:
        """Takes one chunk forward and backward."""
        given = self._handed_back
        task = self._task._replace(
            # a row without a loss has a gradient of zero, which is not no gradient
            has_loss=self._has_loss[i] or given is None,
            given=given,
            is_first=i == self._start,
        )
        loss_sum, after, gradient = self._way.learn(self._model, self._chunks[i], state, task)
        if loss_sum is not None:
            self._loss = self._loss + loss_sum
        if after is not None:
            self._state = self._hand_on(i, after)
        self._handed_back = None if gradient is None else self._restart(i, gradient)
        self._tell()

    @torch.no_grad()
    def _go_on(
        self, start: int, end: int, state: RWKVState | None, *, is_logged: bool = False
    ) -> RWKVState | None:
        """The state behind some chunks, which are not learned now.

        Args:
            is_logged: they never will be, so that this is where their loss is found.
        """
        for i in range(start, end):
            chunk = self._chunks[i]
            if is_logged and self._has_loss[i]:
                sums, layers = forward_loss(self._model, chunk, state)
                self._loss = self._loss + sums.cross_entropy
                state = self._hand_on(i, stack(layers))
            else:
                is_first = is_logged or i == self._start
                after = self._way.forward(self._model, chunk, state, is_first=is_first)
                state = self._hand_on(i, after)
            self._tell()
        return state

    def _hand_on(self, i: int, after: RWKVState) -> RWKVState | None:
        """The state in which the chunk behind chunk i begins."""
        return None if i + 1 == len(self._chunks) else self._restart(i + 1, after)

    def _restart(self, i: int, state: RWKVState) -> RWKVState:
        """The state with zeros in the rows whose document begins with chunk i."""
        restarts = self._restarts[i]
        return state if restarts is None else state.restart(restarts)

    def _tell(self) -> None:
        self._done += 1
        self._after_chunk(self._done, self._total)


def cut_window(batch: Batch, window: slice) -> Batch:
    """Some positions of all rows."""
    weights, ids = batch.weights, batch.segment_ids
    return batch._replace(
        tokens=batch.tokens[:, window],
        targets=batch.targets[:, window],
        weights=None if weights is None else weights[:, window],
        segment_ids=None if ids is None else ids[:, window],
    )


def find_restarts(segment_ids: Tensor | None, position: int, device: torch.device) -> Tensor | None:
    """(B,) bool: the rows in which a further document begins at a position; None: in no row."""
    if segment_ids is None or position == 0:
        return None
    found = segment_ids[:, position] != segment_ids[:, position - 1]
    return copy_to(found, device) if found.any() else None


def _has_graph(state: RWKVState | None) -> bool:
    return state is not None and any(x.requires_grad for x in state)
