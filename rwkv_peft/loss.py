"""The loss of a language model over hidden states, with the head run in chunks of rows."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# largest number of logits that exist at once
MAX_LOGITS = 1 << 24


class LossSums(NamedTuple):
    """Sums over the rows of one call.

    Attributes:
        objective: what backward is called on: cross-entropy and the L2Wrap penalty.
        cross_entropy: cross-entropy alone in nats, without a graph.
    """

    objective: Tensor
    cross_entropy: Tensor


def head_loss(
    head: nn.Module,
    rows: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    l2wrap: float = 0.0,
) -> LossSums:
    """The summed loss of predicting targets from hidden states.

    The logits of all rows never exist together: forward makes them in chunks and keeps their
    gradient with respect to the rows and to the trainable parameters of the head instead.

    Args:
        head: any module from (R, D) to logits (R, V), adapted or not.
        rows: (R, D) hidden states, one for each predicted token.
        targets: (R,) int64, the tokens.
        weights: (R,) factors of each row's loss and penalty; all 1 if None.
        l2wrap: c of the penalty 0.5 c max(logits)^2 a row, RWKV's pull against large logits. Its
            official form adds the gradient c max(logits) beside the loss; as a penalty it follows
            the scale of the loss, whatever the accumulation.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return LossSums(*_HeadLoss.apply(rows, targets, weights, head, l2wrap, *parameters))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows, targets, weights, head, l2wrap, *parameters):  # type: ignore[no-untyped-def]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        sums = torch.zeros(
            2, device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float)
        )
        grad_rows = torch.empty_like(rows) if needs[0] else None
        grads = [torch.zeros_like(p, dtype=sums.dtype) for p in parameters]
        size = max(1, MAX_LOGITS // max(1, getattr(head, "out_features", 65536)))
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(any(needs)):
                x = rows[chunk].detach().requires_grad_(needs[0])
                logits = head(x).to(sums.dtype)
                losses = F.cross_entropy(logits, targets[chunk], reduction="none")
                factors = torch.ones_like(losses) if weights is None else weights[chunk]
                cross_entropy = objective = losses @ factors.to(losses.dtype)
                if l2wrap:
                    penalty = logits.amax(-1).square() @ factors.to(losses.dtype)
                    objective = objective + 0.5 * l2wrap * penalty
            sums += torch.stack((objective.detach(), cross_entropy.detach()))
            if any(needs):
                wanted = ([x] if needs[0] else []) + list(parameters)
                found = list(torch.autograd.grad(objective, wanted))
                if grad_rows is not None:
                    grad_rows[chunk] = found.pop(0)
                for total, grad in zip(grads, found, strict=True):
                    total += grad
        ctx.save_for_backward(grad_rows, *grads)
        ctx.dtypes = [rows.dtype, *(p.dtype for p in parameters)]
        objective, cross_entropy = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad, _):  # type: ignore[no-untyped-def]
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        rows, *parameters = [None if x is None else (x * grad).to(dtype) for x, dtype in pairs]
        return rows, None, None, None, None, *parameters
