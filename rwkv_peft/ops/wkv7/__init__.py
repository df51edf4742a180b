"""WKV-7, the recurrence of RWKV-7: its contract, the check of its arguments, and its backends."""

import functools
from collections.abc import Callable

from torch import Tensor

from rwkv_peft.ops import fla, triton
from rwkv_peft.ops.dispatch import Backend, Request
from rwkv_peft.ops.validation import require_like
from rwkv_peft.ops.wkv7.reference import wkv7_reference

Kernel = Callable[..., tuple[Tensor, Tensor]]


def _load_torch() -> Kernel:
    from rwkv_peft.ops.wkv7.chunked import wkv7_chunked

    return wkv7_chunked


def _load_triton() -> Kernel:
    from rwkv_peft.ops.wkv7.triton import wkv7_triton

    return wkv7_triton


def _load_fla() -> Kernel:
    from rwkv_peft.ops.wkv7.fla import wkv7_fla

    return wkv7_fla


def _load_cuda() -> Kernel:
    from rwkv_peft.ops.wkv7.cuda import wkv7_cuda

    return wkv7_cuda


def _cuda_objection(request: Request) -> str | None:
    from rwkv_peft.ops.wkv7.cuda import objection

    return objection(request)


SHARED_MEMORY = 99 * 1024  # bytes, for the largest of the Triton kernels
_triton_objection = functools.partial(triton.objection, shared_memory=SHARED_MEMORY)

TABLE = (
    Backend("cuda", _load_cuda, _cuda_objection, "kernels for NVIDIA GPUs"),
    Backend("triton", _load_triton, _triton_objection, triton.NOTE),
    Backend("fla", _load_fla, fla.objection, fla.NOTE),
    Backend("torch", _load_torch, lambda request: None, "chunked matrix products in PyTorch"),
    Backend("reference", lambda: wkv7_reference, lambda request: None, "token by token"),
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

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t,
    d = exp(-exp(-1/2) sigmoid(w))

    Args:
        r, k, v, a, b: (B, T, H, N), one dtype, any T >= 1.
        w: (B, T, H, N) decay logits, before any clamp.
        initial_state: (B, H, N, N) float32 (float64 with float64 inputs), rows = value,
            columns = key. Zeros if None.
        segment_ids: (B, T) int32, numbers the documents packed into a row and must not fall along
            it: the state restarts where the number changes. An initial state belongs to the row's
            first document, the last state is that of its last.
        kernel: function of the backend that `dispatch.select` chose; the chunked form if None.
    Returns:
        y (B, T, H, N) in the dtype of r; last state (B, H, N, N), float32 or float64.
    Raises:
        ShapeError: a tensor disagrees with r; the message names it.
    Source: RWKV-LM RWKV-v7/train_temp, the `clampw` form of the operator.
    """
    require_like("wkv7", r, {"w": w, "k": k, "v": v, "a": a, "b": b}, initial_state, segment_ids)
    if r.shape[1] == 1:
        # a single token is the recurrence itself, and no chunk can do it with less work
        kernel = wkv7_reference
    elif kernel is None:
        kernel = _load_torch()
    return kernel(r, w, k, v, a, b, initial_state, segment_ids)
