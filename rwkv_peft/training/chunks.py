"""A chunk of rows on its way through the model: forward alone, or forward and backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.data.batching import Batch
from rwkv_peft.models.base import RWKV
from rwkv_peft.ops.autograd import once_differentiable
from rwkv_peft.state import LayerState, RWKVState
from rwkv_peft.training.step import copy_to, forward_loss


class Task(NamedTuple):
    """What is to be learned from a chunk.

    Attributes:
        has_loss: some of its tokens are trained, or else nothing but `given` brings a gradient.
        given: gradient of the state behind it; None: there is none.
        is_first: of its group: the state before it is as it came, learned or without a gradient.
        divisor, l2wrap, backward: see `Step`.
    """

    has_loss: bool
    given: RWKVState | None
    is_first: bool
    divisor: float
    l2wrap: float
    backward: Callable[[Tensor], None]


class Learned(NamedTuple):
    """What comes of a chunk beside the gradients of what is trained.

    Attributes:
        loss_sum: (), None without a loss.
        after: the state behind it, without a graph; None where its gradient was given, as it was
            known before.
        gradient: of the state before it; None before the first of a group.
    """

    loss_sum: Tensor | None
    after: RWKVState | None
    gradient: RWKVState | None


class Chunks:
    """Takes chunks through a model as they are."""

    def forward(
        self, model: RWKV, chunk: Batch, state: RWKVState | None, *, is_first: bool
    ) -> RWKVState:
        """The state behind a chunk, as `learn` would find it to the bit, in memory of its own."""
        # compiled code for a graph may round otherwise than code without one
        with torch.set_grad_enabled(model.is_compiled):
            layers = forward_layers(model, chunk, as_leaves(state, is_first))
        return stack(layers)

    def learn(self, model: RWKV, chunk: Batch, state: RWKVState | None, task: Task) -> Learned:
        """Forward, loss and backward of a chunk."""
        state, loss_sum = as_leaves(state, task.is_first), None
        if task.has_loss:
            sums, layers = forward_loss(model, chunk, state, l2wrap=task.l2wrap)
            objective, loss_sum = sums.objective / task.divisor, sums.cross_entropy
        else:
            layers = forward_layers(model, chunk, state)
            objective = torch.zeros((), device=model.emb.weight.device)
        after = stack(layers) if task.given is None else None
        if task.given is not None:
            objective = hand_back(objective, task.given, layers)
        task.backward(objective)
        is_end = task.is_first or state is None
        return Learned(loss_sum, after, None if is_end else gradient_of(state))


def forward_layers(model: RWKV, chunk: Batch, state: RWKVState | None) -> list[LayerState]:
    """The layers' states behind a chunk whose loss is not looked at."""
    device = model.emb.weight.device
    ids = None if chunk.segment_ids is None else copy_to(chunk.segment_ids, device)
    _, layers = model.hidden(copy_to(chunk.tokens, device), state, segment_ids=ids)
    return layers


def as_leaves(state: RWKVState | None, is_first: bool) -> RWKVState | None:
    """The state before a chunk, as one that gets a gradient unless a group begins there."""
    if state is None or is_first:
        return state
    return RWKVState(*(x.detach().requires_grad_() for x in state))


@torch.no_grad()
def stack(layers: list[LayerState]) -> RWKVState:
    """The state of a model from those of its layers, without their graph."""
    return RWKVState.from_layers(layers)


def gradient_of(state: RWKVState | None) -> RWKVState | None:
    """The gradient that backward has left in a state."""
    if state is None:
        return None
    return RWKVState(*(torch.zeros_like(x) if x.grad is None else x.grad for x in state))


def hand_back(objective: Tensor, gradients: RWKVState, layers: list[LayerState]) -> Tensor:
    """The objective (), whose backward gives the layers' states these gradients too."""
    states = [x for layer in layers for x in layer]
    given = [x for layer in gradients.layers() for x in layer]
    handed: Tensor = _HandBack.apply(objective, given, *states)
    return handed


class _HandBack(torch.autograd.Function):
    """Adds no <state, gradient> to the objective: the gradients have its loss scale already."""

    @staticmethod
    def forward(ctx: Any, objective, gradients, *states):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return objective.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        return grad, None, *ctx.gradients
