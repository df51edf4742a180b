"""The check that operators make of their arguments."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_peft.errors import ShapeError


def require_like(
    operator: str, r: Tensor, others: Mapping[str, Tensor], initial_state: Tensor | None
) -> None:
    """Raises ShapeError unless all tensors have the shape, type and device of `r`, (B, T, H, N),

    and the state is (B, H, N, N) in float32, or float64 beside float64; the message names the
    tensor.
    """
    if r.ndim != 4 or r.shape[1] < 1:
        raise ShapeError(f"{operator}: r must be (B, T, H, N) with T >= 1, got {tuple(r.shape)}")
    for name, x in others.items():
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise ShapeError(
                f"{operator}: {name} must be like r, {tuple(r.shape)} {r.dtype} on {r.device}; "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    B, _, H, N = r.shape
    if initial_state is not None:
        dtype = torch.promote_types(r.dtype, torch.float32)
        if initial_state.shape != (B, H, N, N) or initial_state.dtype != dtype:
            raise ShapeError(
                f"{operator}: initial_state must be {(B, H, N, N)} {dtype}, "
                f"got {tuple(initial_state.shape)} {initial_state.dtype}"
            )
