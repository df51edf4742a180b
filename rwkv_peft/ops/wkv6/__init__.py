"""WKV-6, the recurrence of RWKV-6, and of RWKV-5 with a constant decay: contract and backends.

    S_t = S_{t-1} diag(d_t) + v_t k_t^T
    y_t = (S_{t-1} + v_t (u k_t)^T) r_t
    d_t = exp(-exp(w_t))

A token reads the state before it writes to it; what it reads of its own key is weighted by u. `w`
may be of any size: a decay may be so strong that nothing of the state is left.

A backend is called as `kernel(r, w, k, v, u, initial_state, segment_ids)` and gives the same as
`wkv6`. What holds for all operators is in `rwkv_peft.ops`.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from rwkv_peft.errors import ShapeError
from rwkv_peft.ops import fla, triton
from rwkv_peft.ops.dispatch import Backend
from rwkv_peft.ops.validation import require_like
from rwkv_peft.ops.wkv6.chunked import wkv6_chunked
from rwkv_peft.ops.wkv6.reference import wkv6_reference

Kernel = Callable[..., tuple[Tensor, Tensor]]

SHARED_MEMORY = 64 * 1024  # bytes, for the largest of the Triton kernels

TABLE = (
    Backend(
        "cuda",
        "rwkv_peft.ops.wkv6.cuda:wkv6_cuda",
        "rwkv_peft.ops.wkv6.cuda:objection",
        "kernels for NVIDIA GPUs",
    ),
    Backend(
        "triton",
        "rwkv_peft.ops.wkv6.triton:wkv6_triton",
        functools.partial(triton.objection, shared_memory=SHARED_MEMORY),
        triton.NOTE,
    ),
    Backend("fla", "rwkv_peft.ops.wkv6.fla:wkv6_fla", fla.objection, fla.NOTE),
    Backend(
        "torch",
        "rwkv_peft.ops.wkv6.chunked:wkv6_chunked",
        None,
        "chunked matrix products in PyTorch",
    ),
    Backend("reference", "rwkv_peft.ops.wkv6.reference:wkv6_reference", None, "token by token"),
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

    Args:
        r, w, k, v: (B, T, H, N), one dtype, any T >= 1; w of any size. RWKV-5 expands its w.
        u: (H, N), the weight of a token's own key.
        initial_state: (B, H, N, N) float32 (float64 with float64 inputs), rows = value,
            columns = key. Zeros if None.
        segment_ids: (B, T) int32, numbers of the documents packed into a row, see `rwkv_peft.ops`.
        kernel: the function of the backend that `select` chose; the chunked form if None.
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
        kernel = wkv6_chunked
    return kernel(r, w, k, v, u, initial_state, segment_ids)
