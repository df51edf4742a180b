"""WKV-6, the recurrence of RWKV-6, and of RWKV-5 with a constant decay: contract and backends."""

import functools
from collections.abc import Callable

from torch import Tensor

from rwkv_peft.errors import ShapeError
from rwkv_peft.ops import fla, triton
from rwkv_peft.ops.dispatch import Backend, Request
from rwkv_peft.ops.validation import require_like
from rwkv_peft.ops.wkv6.reference import wkv6_reference

Kernel = Callable[..., tuple[Tensor, Tensor]]


def _load_torch() -> Kernel:
    from rwkv_peft.ops.wkv6.chunked import wkv6_chunked

    return wkv6_chunked


def _load_cuda() -> Kernel:
    from rwkv_peft.ops.wkv6.cuda import wkv6_cuda

    return wkv6_cuda


def _cuda_objection(request: Request) -> str | None:
    from rwkv_peft.ops.wkv6.cuda import objection

    return objection(request)


def _load_triton() -> Kernel:
    from rwkv_peft.ops.wkv6.triton import wkv6_triton

    return wkv6_triton


def _load_fla() -> Kernel:
    from rwkv_peft.ops.wkv6.fla import wkv6_fla

    return wkv6_fla


SHARED_MEMORY = 64 * 1024  # bytes, for the largest of the Triton kernels
_triton_objection = functools.partial(triton.objection, shared_memory=SHARED_MEMORY)

TABLE = (
    Backend("cuda", _load_cuda, _cuda_objection, "kernels for NVIDIA GPUs"),
    Backend("triton", _load_triton, _triton_objection, triton.NOTE),
    Backend("fla", _load_fla, fla.objection, fla.NOTE),
    Backend("torch", _load_torch, lambda request: None, "chunked matrix products in PyTorch"),
    Backend("reference", lambda: wkv6_reference, lambda request: None, "token by token"),
)


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6 recurrence over time; differentiable in every tensor.

    S_t = S_{t-1} diag(d_t) + v_t k_t^T,   y_t = (S_{t-1} + v_t (u k_t)^T) r_t,   d = exp(-exp(w))

    Args:
        r, w, k, v: (B, T, H, N), one dtype, any T >= 1; w of any size. RWKV-5 expands its w.
        u: (H, N), weight of a token's own key.
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
    Source: RWKV-LM, RWKV-v5/src/model.py, `RWKV_Tmix_x060`.
    """
    require_like("wkv6", r, {"w": w, "k": k, "v": v}, initial_state, segment_ids)
    if u.shape != r.shape[2:]:
        raise ShapeError(f"wkv6: u must be {tuple(r.shape[2:])}, got {tuple(u.shape)}")
    if r.shape[1] == 1:
        kernel = wkv6_reference
    elif kernel is None:
        kernel = _load_torch()
    return kernel(r, w, k, v, u, initial_state, segment_ids)
