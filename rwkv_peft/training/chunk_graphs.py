"""Chunks as CUDA graphs: one for a chunk forward, one for forward and backward."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.data.batching import Batch
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState
from rwkv_peft.training.chunks import Chunks, Learned, Task, gradient_of, hand_back, stack
from rwkv_peft.training.graphs import MAX_GRAPHS, UNCAPTURED, Inputs, draws, forward_inputs

Tensors = Sequence[Tensor | None]
# results of tensors, each of which is one of few that are read at every call
Function = Callable[[list[Tensor | None]], list[Tensor | None]]
NOTHING: list[Tensor | None] = [None, None, None]


class GraphedChunks(Chunks):
    """Chunks in few shapes, each of which is captured once and replayed.

    The states of both ends and their gradients are copied into the memory of a graph and out of it,
    which is little beside a chunk. Gradients of what is trained go where backward has put them when
    a shape was captured: the optimizer must keep their memory from step to step.
    """

    def __init__(
        self,
        device: torch.device,
        chunk_ctx: int,
        *,
        is_captured: bool = True,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """Takes the longest chunk, and what is to be called when a shape cannot be captured.

        Args:
            is_captured: capture shapes; if not, they only become few.
            on_failure: is told why, and from then on chunks run as they are; None: it is raised.
        """
        self._device, self._chunk_ctx, self._is_captured = device, chunk_ctx, is_captured
        self._on_failure = on_failure
        # graphs read it as long as they live
        self._zero = torch.zeros((), device=device)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._graphs: dict[tuple[object, ...], Captured] = {}
        self._pool = torch.get_device_module(device).graph_pool_handle() if is_captured else None

    @property
    def num_graphs(self) -> int:
        """Shapes that were captured so far, forward and with backward."""
        return len(self._graphs)

    def forward(
        self, model: RWKV, chunk: Batch, state: RWKVState | None, *, is_first: bool
    ) -> RWKVState:
        """The state behind a chunk; see `Chunks`."""
        if chunk.tokens.shape[1] < self._chunk_ctx:
            # what is filled up would change the state
            return super().forward(model, chunk, state, is_first=is_first)

        def run(given: list[Tensor | None]) -> list[Tensor | None]:
            tokens, segment_ids, *before = given
            assert tokens is not None
            with torch.set_grad_enabled(model.is_compiled):
                _, layers = model.hidden(tokens, as_state(before), segment_ids=segment_ids)
            return [*stack(layers)]

        before = NOTHING if state is None else [x.detach() for x in state]
        given = [chunk.tokens, chunk.segment_ids, *before]
        needs = [False, False, *_needs_gradient(state, is_first)] if model.is_compiled else []
        found = as_state(self._run("forward", model, run, given, needs))
        assert found is not None
        return found

    def learn(self, model: RWKV, chunk: Batch, state: RWKVState | None, task: Task) -> Learned:
        """Forward, loss and backward of a chunk; see `Chunks`."""
        size, zero = len(Inputs._fields), self._zero

        def run(given: list[Tensor | None]) -> list[Tensor | None]:
            inputs, before = Inputs(*given[:size]), as_state(given[size : size + 3])  # type: ignore[arg-type]
            sums, layers = forward_inputs(
                model, inputs, before, task.l2wrap, has_loss=task.has_loss
            )
            objective = zero if sums is None else sums.objective
            after = [*stack(layers)] if task.given is None else NOTHING
            if (behind := as_state(given[size + 3 :])) is not None:
                objective = hand_back(objective, behind, layers)
            task.backward(objective)
            has_gradient = before is not None and before.wkv.requires_grad
            gradient = gradient_of(before) if has_gradient else None
            return [None if sums is None else sums.cross_entropy, *after, *(gradient or NOTHING)]

        before = NOTHING if state is None else [x.detach() for x in state]
        given = [
            *Inputs.of(chunk, self._chunk_ctx, task.divisor),
            *before,
            *(task.given or NOTHING),
        ]
        needs = [*[False] * size, *_needs_gradient(state, task.is_first), *[False] * 3]
        kind = f"learn {task.has_loss} {task.l2wrap}"
        loss_sum, *others = self._run(kind, model, run, given, needs)
        after, gradient = as_state(others[:3]), as_state(others[3:])
        if task.is_first and state is not None and gradient is not None:
            # the way to what a learned state is made of is made anew each time
            pairs = [(x, g) for x, g in zip(state, gradient, strict=True) if x.requires_grad]
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
            gradient = None
        return Learned(loss_sum, after, gradient)

    def _run(
        self, kind: str, model: RWKV, function: Function, given: Tensors, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The results of a function, by its graph if its shape has one."""
        needs = list(needs) or [False] * len(given)
        shapes = (None if x is None else (x.shape, x.dtype) for x in given)
        key = (kind, *needs, *shapes)
        if key not in self._graphs:
            self._seen[key] += 1
            is_due = self._is_captured and self._seen[key] > UNCAPTURED
            if not is_due or len(self._graphs) >= MAX_GRAPHS:
                return function(place(given, needs, self._device))
            if model.grad_cp and not model.is_compiled and draws(model):
                # a recomputed block must draw again what it drew, which a graph cannot
                self._is_captured = False
                return function(place(given, needs, self._device))
            try:
                placed = place(given, needs, self._device)
                self._graphs[key] = Captured(self._device, self._pool, function, placed)
            except RuntimeError as error:
                if self._on_failure is None:
                    raise
                self._is_captured = False
                self._on_failure(str(error).strip().splitlines()[0])
                return function(place(given, needs, self._device))
        return self._graphs[key].replay(given)


class Captured:
    """The graph of a function, and the tensors that it reads and writes.

    Nothing runs before it is replayed.
    """

    def __init__(
        self, device: torch.device, pool: Any, function: Function, given: list[Tensor | None]
    ) -> None:
        module = torch.get_device_module(device)
        self._given, self._graph = given, module.CUDAGraph()
        with module.graph(
            self._graph,
            pool=pool,
            stream=module.current_stream(),
            # other threads may copy batches meanwhile
            capture_error_mode="thread_local",
        ):
            self._results = function(given)

    @torch.no_grad()
    def replay(self, given: Tensors) -> list[Tensor | None]:
        """The results of other tensors of the same shapes, in memory of their own."""
        for own, x in zip(self._given, given, strict=True):
            if own is not None and x is not None:
                x = x.pin_memory() if x.device.type == "cpu" else x
                own.copy_(x, non_blocking=True)
        self._graph.replay()
        return [None if x is None else x.clone() for x in self._results]


def place(given: Tensors, needs: Sequence[bool], device: torch.device) -> list[Tensor | None]:
    """Copies of tensors on a device, leaves where they need a gradient."""
    placed: list[Tensor | None] = []
    for x, need in zip(given, needs, strict=True):
        copy = None if x is None else x.to(device, copy=True)
        placed.append(copy if copy is None or not need else copy.requires_grad_())
    return placed


def as_state(tensors: Tensors) -> RWKVState | None:
    """Three tensors as a state; None if they are None."""
    return None if tensors[0] is None else RWKVState(*tensors)  # type: ignore[arg-type]


def _needs_gradient(state: RWKVState | None, is_first: bool) -> list[bool]:
    """Of the tensors of the state before a chunk."""
    if state is None:
        return [False] * 3
    return [x.requires_grad or not is_first for x in state]
