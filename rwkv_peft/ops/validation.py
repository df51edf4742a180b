"""The check of the operators' arguments."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_peft.errors import ShapeError


def require_like(
    operator: str,
    r: Tensor,
    others: Mapping[str, Tensor],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    """Raises ShapeError unless the arguments of an operator agree; the message names the tensor.

    Args:
        r: (B, T, H, N) with T >= 1.
        others: tensors that must have the shape, dtype and device of `r`, by name.
        initial_state: (B, H, N, N) float32, or float64 beside float64; or None.
        segment_ids: see `require_segments`.
    """
    if r.ndim != 4 or r.shape[1] < 1:
        raise ShapeError(f"{operator}: r must be (B, T, H, N) with T >= 1, got {tuple(r.shape)}")
    # read once: calling the kernels takes no longer than this check
    shape, dtype, device = r.shape, r.dtype, r.device
    for name, x in others.items():
        if x.shape != shape or x.dtype != dtype or x.device != device:
            raise ShapeError(
                f"{operator}: {name} must be like r, {tuple(shape)} {dtype} on {device}; "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    B, _, H, N = shape
    if initial_state is not None:
        wide = torch.promote_types(dtype, torch.float32)
        if initial_state.shape != (B, H, N, N) or initial_state.dtype != wide:
            raise ShapeError(
                f"{operator}: initial_state must be {(B, H, N, N)} {wide}, "
                f"got {tuple(initial_state.shape)} {initial_state.dtype}"
            )
    require_segments(operator, segment_ids, r)


def require_segments(where: str, segment_ids: Tensor | None, like: Tensor) -> None:
    """Raises ShapeError unless segment ids are (B, T) int32 on the device of `like`, (B, T, ...).

    That they do not fall along a row is not checked: the GPU would have to be waited for.
    """
    if segment_ids is None:
        return
    shape, device = like.shape[:2], like.device
    if (segment_ids.shape, segment_ids.dtype, segment_ids.device) != (shape, torch.int32, device):
        raise ShapeError(
            f"{where}: segment_ids must be {tuple(shape)} torch.int32 on {device}, "
            f"got {tuple(segment_ids.shape)} {segment_ids.dtype} on {segment_ids.device}"
        )
