"""WKV-7 by Triton kernels: how the six stages are started, and with which settings."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.ops.triton import Launcher, require_head_size
from rwkv_peft.ops.wkv7 import triton_kernels as kernels
from rwkv_peft.ops.wkv7.stages import Stages, register


class _Settings(NamedTuple):
    """For a class of input types."""

    chunk: int
    operand: Any  # type of the operands of products
    precision: str  # of products whose operands are float32


_BF16 = _Settings(64, kernels.BF16, "ieee")
# float16 has the digits but not the range for the operands
_WIDE = _Settings(16, kernels.FP32, "ieee")

_chunk_forward = Launcher(kernels.chunk_forward, num_warps=8)
_scan = Launcher(kernels.scan, num_warps=4)
_output = Launcher(kernels.output, num_warps=4)
_chunk_backward = Launcher(kernels.chunk_backward, num_warps=4)
# eight warps would need 1 KiB more of shared memory than an Ada GPU has
_gradients = Launcher(kernels.gradients, num_warps=4)
SCAN_ROWS, SCAN_STAGES = 16, 4


def _settings(dtype: torch.dtype) -> _Settings:
    # Triton's interpreter has no arithmetic of bf16
    return _BF16 if dtype == torch.bfloat16 and _scan.is_compiled else _WIDE


def _over_chunks(
    launcher: Launcher, tensors: tuple[Tensor | None, ...], like: Tensor, *flags: bool
) -> None:
    B, T, H, N = like.shape
    require_head_size(N)
    C, operand, precision = _settings(like.dtype)
    M = (T + C - 1) // C
    # some address stands for a tensor that is not there; the flags say that it is not used
    given = tuple([like if x is None else x for x in tensors])
    launcher((B * M * H, 1, 1), given, (T, H, M), (C, N, *flags, operand, precision))


def _over_states(
    transition: Tensor,
    added: Tensor,
    decay: Tensor,
    start: Tensor | None,
    states: Tensor,
    end: Tensor,
    *,
    reverse: bool,
) -> None:
    B, H, M, N = decay.shape
    _, operand, precision = _settings(states.dtype)
    given = (transition, added, decay, end if start is None else start, states, end)
    constants = (N, SCAN_ROWS, start is not None, reverse, operand, precision, SCAN_STAGES)
    _scan((B * H, N // SCAN_ROWS, 1), given, (M,), constants)


def _forward(*tensors: Tensor | None) -> None:
    r, segment_ids, inverse = tensors[0], tensors[6], tensors[-1]
    assert r is not None
    _over_chunks(_chunk_forward, tensors, r, segment_ids is not None, inverse is not None)


def _backward(*tensors: Tensor | None) -> None:
    r, segment_ids = tensors[0], tensors[4]
    assert r is not None
    _over_chunks(_chunk_backward, tensors, r, segment_ids is not None)


def _inputs(*tensors: Tensor | None) -> None:
    r, segment_ids = tensors[0], tensors[6]
    assert r is not None
    # the last state is not needed: what decays give to it is made again
    _over_chunks(_gradients, (*tensors[:9], *tensors[10:]), r, segment_ids is not None)


wkv7_triton = register(
    "triton",
    Stages(
        chunk_length=lambda dtype, device: _settings(dtype).chunk,
        chunk_forward=_forward,
        state_forward=lambda *tensors: _over_states(*tensors, reverse=False),
        output=lambda *tensors: _over_chunks(_output, tensors, tensors[-1]),
        chunk_backward=_backward,
        state_backward=lambda *tensors: _over_states(*tensors, reverse=True),
        gradients=_inputs,
    ),
)


def variants() -> Iterator[tuple[Launcher, tuple[Any, ...]]]:
    """All that these kernels are compiled to: the arguments, tensors and numbers by their types."""
    for dtype in (torch.bfloat16, torch.float32):
        chunk, operand, precision = _settings(dtype)
        io, wide, segments = "*bf16" if dtype == torch.bfloat16 else "*fp32", "*fp32", "*i32"
        end, numbers = (operand, precision), ("i32",) * 3
        flags = (chunk, 64, True)
        scratch = (io, io, wide)
        yield (
            _chunk_forward,
            (*(io,) * 6, segments, io, *scratch, io, io, *numbers, *flags, True, *end),
        )
        yield _chunk_backward, (*(io,) * 4, segments, io, io, *scratch, *numbers, *flags, *end)
        yield _gradients, (*(io,) * 6, segments, *(io,) * 10, *numbers, *flags, *end)
        yield _output, (io, io, io, *numbers, chunk, 64, *end)
        for reverse in (False, True):
            constants = (64, SCAN_ROWS, True, reverse, *end, SCAN_STAGES)
            yield _scan, (*scratch, wide, io, wide, "i32", *constants)
