"""A micro-batch's forward and backward as a CUDA graph: one launch for its thousands of kernels."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.loss import LossSums, head_loss
from rwkv_peft.models.base import RWKV
from rwkv_peft.ops.dequantise.ahead import Order, follow_order, note_order
from rwkv_peft.state import LayerState, RWKVState
from rwkv_peft.training.step import StepOutput, copy_to

# of one shape, that run before it is captured: what is compiled, tuned or laid out at a first call
# is then there, and shapes that come seldom cost no capture
UNCAPTURED = 2
# graphs that are kept; shapes beyond that run as they are
MAX_GRAPHS = 24
# parts of a micro-batch's positions, to whose multiples the number of trained ones is filled up
HEAD_PARTS = 8


class GraphedStep:
    """`full_step` for a GPU, captured once for each shape and replayed; see `Step`.

    Rows are padded, and the trained positions filled up by others of no weight, so that few shapes
    come. Gradients go where backward has put them when a shape was captured: the optimizer must
    keep their memory from step to step.
    """

    def __init__(
        self,
        device: torch.device,
        ctx_len: int,
        *,
        is_captured: bool = True,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """Takes the longest row, and what is to be called when a shape cannot be captured.

        Args:
            is_captured: capture shapes; if not, they only become few.
            on_failure: is told why, and from then on steps run as they are; None: it is raised.
        """
        self._device, self._ctx_len, self._is_captured = device, ctx_len, is_captured
        self._on_failure = on_failure
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._orders: dict[tuple[object, ...], Order] = {}
        self._pool = torch.get_device_module(device).graph_pool_handle() if is_captured else None

    @property
    def num_graphs(self) -> int:
        """Shapes that were captured so far."""
        return len(self._graphs)

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
        """Takes whole rows through the model at once."""
        inputs = Inputs.of(batch, self._ctx_len, divisor)
        shape = (*(None if x is None else x.shape for x in inputs), state is None, l2wrap)
        graph = self._graphs.get(shape)
        if graph is None:
            self._seen[shape] += 1
            is_due = self._is_captured and self._seen[shape] > UNCAPTURED
            if is_due and len(self._graphs) < MAX_GRAPHS:
                # the weights of a layer are dense at once where memory is not short
                order = [] if model.grad_cp else self._orders.pop(shape)
                with follow_order(order, self._device):
                    graph = self._capture(model, inputs, state, l2wrap, backward)
        if graph is None:
            with note_order() as self._orders[shape]:
                sums = _forward(model, inputs.to(self._device), state, l2wrap)
                backward(sums.objective)
            return StepOutput(sums.cross_entropy, batch.num_trained)
        self._graphs[shape] = graph
        return StepOutput(graph.replay(inputs, state), batch.num_trained)

    def _capture(
        self,
        model: RWKV,
        inputs: "Inputs",
        state: RWKVState | None,
        l2wrap: float,
        backward: Callable[[Tensor], None],
    ) -> "_Captured | None":
        """The graph of a shape; None if its kernels cannot be captured, as when one waits."""
        if model.grad_cp and not model.is_compiled and draws(model):
            # a recomputed block must draw again what it drew, which a graph cannot
            self._is_captured = False
            return None
        graph = _Captured(self._device, self._pool)
        try:
            graph.capture(model, inputs.to(self._device), state, l2wrap, backward)
        except RuntimeError as error:
            if self._on_failure is None:
                raise
            self._is_captured = False
            self._on_failure(str(error).strip().splitlines()[0])
            return None
        return graph


class Inputs(NamedTuple):
    """A micro-batch as it goes to the device.

    Attributes:
        tokens: (B, T).
        divisor: (), see `Step`.
        targets: (n,) tokens after the trained positions; 0 where `weights` is 0.
        weights: (n,) float32, of their losses.
        trained: (n,) which of the B*T positions meet the head, each once; None: all.
        segment_ids: (B, T) int32, or None.
    """

    tokens: Tensor
    divisor: Tensor
    targets: Tensor
    weights: Tensor
    trained: Tensor | None
    segment_ids: Tensor | None

    @classmethod
    def of(cls, batch: Batch, ctx_len: int, divisor: float) -> "Inputs":
        """On the host, in one of few shapes."""
        batch = batch.lengthened(min(ctx_len, _round_up(batch.tokens.shape[1])))
        targets = batch.targets.flatten()
        is_trained = targets != IGNORE
        weights = is_trained.float() if batch.weights is None else batch.weights.flatten()
        weights = weights.where(is_trained, 0)
        trained = _choose_positions(is_trained)
        if trained is not None:
            targets, weights = targets[trained], weights[trained]
        return cls(
            batch.tokens,
            torch.tensor(divisor),
            targets.clamp(min=0),
            weights,
            trained,
            batch.segment_ids,
        )

    def to(self, device: torch.device) -> "Inputs":
        """Copies on a device."""
        copies: Any = (None if x is None else copy_to(x, device) for x in self)
        return Inputs(*copies)

    def copy_(self, others: "Inputs") -> None:
        """Takes the values of others of the same shapes, without waiting."""
        for own, x in zip(self, others, strict=True):
            if own is not None and x is not None:
                own.copy_(x.pin_memory(), non_blocking=True)


def _round_up(length: int) -> int:
    """The next of the lengths of which four lie between two powers of two, multiples of 16."""
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _choose_positions(is_trained: Tensor) -> Tensor | None:
    """Trained positions and some others, in a number of which there are few; None: all."""
    total, count = is_trained.numel(), int(is_trained.sum())
    part = -(-total // HEAD_PARTS)
    size = max(1, -(-count // part)) * part
    if size >= total:
        return None
    others = (~is_trained).nonzero().squeeze(1)[: size - count]
    return torch.cat((is_trained.nonzero().squeeze(1), others))


def draws(model: RWKV) -> bool:
    """Whether a model draws random numbers in training."""
    return any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def forward_inputs(
    model: RWKV,
    inputs: Inputs,
    state: RWKVState | None,
    l2wrap: float,
    *,
    has_loss: bool = True,
) -> tuple[LossSums | None, list[LayerState]]:
    """Loss sums of a micro-batch, whose objective is divided already, and the layers' last states.

    Args:
        has_loss: some position is trained; None in place of the sums if not.
    """
    hidden, layers = model.hidden(inputs.tokens, state, segment_ids=inputs.segment_ids)
    if not has_loss:
        return None, layers
    rows = hidden.flatten(0, 1)
    if inputs.trained is not None:
        rows = rows.index_select(0, inputs.trained)
    sums = head_loss(
        model.head,
        rows,
        inputs.targets,
        weights=inputs.weights,
        l2wrap=l2wrap,
        is_compiled=model.is_compiled,
    )
    return LossSums(sums.objective / inputs.divisor, sums.cross_entropy), layers


def _forward(model: RWKV, inputs: Inputs, state: RWKVState | None, l2wrap: float) -> LossSums:
    sums, _ = forward_inputs(model, inputs, state, l2wrap)
    assert sums is not None
    return sums


class _Captured:
    """The graph of one shape, and the tensors that it reads and writes."""

    _inputs: Inputs
    _state: RWKVState | None
    _loss_sum: Tensor

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._module, self._pool = torch.get_device_module(device), pool
        self._graph = self._module.CUDAGraph()

    def capture(
        self,
        model: RWKV,
        inputs: Inputs,
        state: RWKVState | None,
        l2wrap: float,
        backward: Callable[[Tensor], None],
    ) -> None:
        """Notes the kernels of a forward and backward, none of which runs."""
        self._inputs, self._state = inputs, None
        if state is not None:
            # leaves, as the graph that leads from the trained states to them is made anew each time
            copies = (x.detach().clone().requires_grad_(x.requires_grad) for x in state)
            self._state = RWKVState(*copies)
        # objects of an earlier run that are collected meanwhile would end the capture
        gc.collect()
        with self._module.graph(
            self._graph,
            pool=self._pool,
            stream=self._module.current_stream(),
            # other threads may copy batches meanwhile
            capture_error_mode="thread_local",
        ):
            sums = _forward(model, self._inputs, self._state, l2wrap)
            backward(sums.objective)
        self._loss_sum = sums.cross_entropy

    def replay(self, inputs: Inputs, state: RWKVState | None) -> Tensor:
        """Adds the gradients of other inputs of the same shapes; gives their summed loss ()."""
        self._inputs.copy_(inputs)
        if state is not None and self._state is not None:
            with torch.no_grad():
                for own, x in zip(self._state, state, strict=True):
                    own.copy_(x)
        self._graph.replay()
        if state is not None and self._state is not None:
            pairs = [
                (x, own.grad)
                for own, x in zip(self._state, state, strict=True)
                if x.requires_grad and own.grad is not None
            ]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
        return self._loss_sum.clone()
