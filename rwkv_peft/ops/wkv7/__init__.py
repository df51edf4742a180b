"""WKV-7, the recurrence of RWKV-7: its contract, the check of its arguments, and its backends.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
    y_t = S_t r_t
    d_t = exp(-exp(-1/2) sigmoid(w_t))

`w` is the decay logit as the model gives it. Inputs are processed as little as possible, so that
each backend can fuse what it likes. The state is float32 always, or float64 beside float64 inputs.
The last state is always given: no backend would save work by leaving it out.

A backend is called as `kernel(r, w, k, v, a, b, initial_state, segment_ids)` and gives the same as
`wkv7`. What holds for all operators is in `rwkv_peft.ops`.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from rwkv_peft.ops import fla, triton
from rwkv_peft.ops.dispatch import Backend
from rwkv_peft.ops.validation import require_like
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_reference

Kernel = Callable[..., tuple[Tensor, Tensor]]

SHARED_MEMORY = 99 * 1024  # bytes, for the largest of the Triton kernels

TABLE = (
    Backend(
        "cuda",
        "rwkv_peft.ops.wkv7.cuda:wkv7_cuda",
        "rwkv_peft.ops.wkv7.cuda:objection",
        "kernels for NVIDIA GPUs",
    ),
    Backend(
        "triton",
        "rwkv_peft.ops.wkv7.triton:wkv7_triton",
        functools.partial(triton.objection, shared_memory=SHARED_MEMORY),
        triton.NOTE,
    ),
    Backend("fla", "rwkv_peft.ops.wkv7.fla:wkv7_fla", fla.objection, fla.NOTE),
    Backend(
        "torch",
        "rwkv_peft.ops.wkv7.chunked:wkv7_chunked",
        None,
        "chunked matrix products in PyTorch",
    ),
    Backend("reference", "rwkv_peft.ops.wkv7.reference:wkv7_reference", None, "token by token"),
)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7 recurrence over time; differentiable in every tensor.

    Args:
        r, k, v, a, b: (B, T, H, N), one dtype, any T >= 1.
        w: (B, T, H, N) decay logits, before any clamp.
        initial_state: (B, H, N, N) float32 (float64 with float64 inputs), rows = value,
            columns = key. Zeros if None.
        segment_ids: (B, T) int32, numbers of the documents packed into a row, see `rwkv_peft.ops`.
        kernel: the function of the backend that `select` chose; the chunked form if None.
    Returns:
        y (B, T, H, N) in the dtype of r; last state (B, H, N, N), float32 or float64.
    Raises:
        ShapeError: a tensor disagrees with r; the message names it.
    Source: RWKV-LM RWKV-v7/train_temp, the `clampw` form of the operator.
    """
    require_like("wkv7", r, {"w": w, "k": k, "v": v, "a": a, "b": b}, initial_state, segment_ids)
    if r.shape[1] == 1:
        # one token is one step of the recurrence: no chunked form does it with less work
        kernel = wkv7_reference
    elif kernel is None:
        kernel = wkv7_chunked
    return kernel(r, w, k, v, a, b, initial_state, segment_ids)
