"""The loss of a language model over hidden states, with the head run in chunks of rows."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_peft.models.compile import compile_function

# largest number of logits that exist at once; compiled, they need no float32 copies
MAX_LOGITS, MAX_COMPILED = 1 << 24, 1 << 25
_compile = cache(compile_function)


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
    is_compiled: bool = False,
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
        is_compiled: use a compiler for all but the head itself.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    if weights is None:
        weights = torch.ones_like(targets, dtype=torch.promote_types(rows.dtype, torch.float))
    size = (MAX_COMPILED if is_compiled else MAX_LOGITS) // getattr(head, "out_features", 65536)
    losses = _compile(losses_of) if is_compiled else losses_of
    return LossSums(
        *_HeadLoss.apply(rows, targets, weights, head, l2wrap, losses, max(1, size), *parameters)
    )


def losses_of(
    logits: Tensor, targets: Tensor, weights: Tensor, l2wrap: float
) -> tuple[Tensor, Tensor]:
    """Weighted sums of objective and cross-entropy (2,), and the objective's gradient (R, V).

    Args:
        logits: (R, V) of any dtype, the gradient's too; sums are in float32 or float64.
        targets: (R,), as the others in `head_loss`.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float))
    weights = weights.to(x.dtype)
    top = x.amax(-1, keepdim=True)
    gradient = (x - top).exp_()
    total = gradient.sum(-1, keepdim=True)
    wanted = targets.unsqueeze(-1)
    cross_entropy = (total.log() + top - x.gather(-1, wanted)).squeeze(-1)
    # rows without a weight may hold anything
    unused = weights == 0
    cross_entropy = (cross_entropy * weights).masked_fill_(unused, 0).sum()
    objective = cross_entropy
    # one after the other in place, as these are the largest tensors of a step
    gradient.div_(total)
    gradient.sub_((torch.arange(x.shape[-1], device=x.device) == wanted).to(x.dtype))
    if l2wrap:
        squares = (top.squeeze(-1).square() * weights).masked_fill_(unused, 0).sum()
        objective = cross_entropy + 0.5 * l2wrap * squares
        is_top = (x == top).to(x.dtype)
        # equal logits share the gradient
        gradient.addcmul_(is_top, l2wrap * top / is_top.sum(-1, keepdim=True))
    gradient.mul_(weights.unsqueeze(-1)).masked_fill_(unused.unsqueeze(-1), 0)
    return torch.stack((objective, cross_entropy)), gradient.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows, targets, weights, head, l2wrap, losses, size, *parameters):  # type: ignore[no-untyped-def]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[7:]]
        dtype = torch.promote_types(rows.dtype, torch.float)
        sums = torch.zeros(2, device=rows.device, dtype=dtype)
        grad_rows = torch.empty_like(rows) if needs[0] else None
        grads = [torch.zeros_like(p, dtype=dtype) for p in parameters]
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(any(needs)):
                x = rows[chunk].detach().requires_grad_(needs[0])
                logits = head(x)
            found_sums, dlogits = losses(logits.detach(), targets[chunk], weights[chunk], l2wrap)
            sums += found_sums
            if any(needs):
                wanted = ([x] if needs[0] else []) + list(parameters)
                found = list(torch.autograd.grad(logits, wanted, dlogits))
                if grad_rows is not None:
                    grad_rows[chunk] = found.pop(0)
                for total, grad in zip(grads, found, strict=True):
                    total += grad
            # the next chunk's take their place
            del logits, dlogits
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
        return rows, *[None] * 6, *parameters
