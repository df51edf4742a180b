"""WKV-6 by Triton kernels: how the four stages are started, and with which settings."""

from collections.abc import Iterator

import torch

from rwkv_peft.ops.triton import Launcher, Scan, Settings, Variant, dot_precisions, start_chunks
from rwkv_peft.ops.triton_kernels import BF16, FP32
from rwkv_peft.ops.wkv6 import triton_kernels as kernels
from rwkv_peft.ops.wkv6.stages import Stages, register

# programs of a chunk where each has a slab of its tokens
SLABS = 4
_BF16 = Settings(16 * SLABS, BF16, "tf32x3")
# float16 has not the range for the states
_WIDE = Settings(16 * SLABS, FP32, "tf32x3")

_chunk = Launcher(kernels.chunk, num_warps=4)
# few bytes a program and chunk: as many as hide the time that memory takes to answer
_scan = Scan(4, num_warps=1, stages=8, has_transition=False)
_output = Launcher(kernels.output, num_warps=4)
# four warps have not the registers for float32
_gradients = {
    BF16: Launcher(kernels.gradients, num_warps=4),
    FP32: Launcher(kernels.gradients, num_warps=8),
}


def settings_for(dtype: torch.dtype) -> Settings:
    """How inputs of a type are computed on the current device."""
    if not _output.is_compiled:  # Triton's interpreter has no arithmetic of bf16
        return _WIDE
    found = _BF16 if dtype == torch.bfloat16 else _WIDE
    return found if found.precision in dot_precisions() else found._replace(precision="ieee")


def _chunks(w, keys, values, segment_ids, reverse, added, decay):  # type: ignore[no-untyped-def]
    tensors = (w, keys, values, segment_ids, added, decay)
    start_chunks(_chunk, settings_for(w.dtype), tensors, w, segment_ids is not None, reverse)


def _states(added, decay, first, reverse, states, last):  # type: ignore[no-untyped-def]
    settings = settings_for(added.dtype)
    _scan(settings, None, added, decay, first, states, last, reverse=reverse)


def _outputs(r, w, k, v, u, segment_ids, states, y):  # type: ignore[no-untyped-def]
    tensors, is_packed = (r, w, k, v, u, segment_ids, states, y), segment_ids is not None
    start_chunks(_output, settings_for(r.dtype), tensors, r, is_packed, parts=SLABS)


def _inputs(r, w, k, v, u, segment_ids, states, dstates, dy, *grads):  # type: ignore[no-untyped-def]
    *wide, du = grads
    parts = du.new_empty(*du.shape[:3], SLABS, du.shape[3])
    tensors = (r, w, k, v, u, segment_ids, states, dstates, dy, *wide, parts)
    settings = settings_for(r.dtype)
    launcher, is_packed = _gradients[settings.operand], segment_ids is not None
    start_chunks(launcher, settings, tensors, r, is_packed, parts=SLABS)
    torch.sum(parts, 3, out=du)


wkv6_triton = register(
    "triton",
    Stages(
        chunk_length=lambda dtype, device: settings_for(dtype).chunk,
        chunk=_chunks,
        state=_states,
        output=_outputs,
        gradients=_inputs,
    ),
)


def variants() -> Iterator[Variant]:
    """All that these kernels are compiled to."""
    for settings, io in ((_BF16, "*bf16"), (_WIDE, "*fp32")):
        wide, segments = "*fp32", "*i32"
        numbers, sizes, end = ("i32",) * 3, (settings.chunk, 64, True), settings[1:]
        inputs = (*(io,) * 4, wide, segments, io)
        yield _output, (*inputs, io, *numbers, *sizes, *end)
        launcher = _gradients[settings.operand]
        yield launcher, (*inputs, *(io,) * 6, wide, *numbers, *sizes, *end)
        for reverse in (False, True):
            yield _chunk, (io, io, io, segments, io, wide, *numbers, *sizes, reverse, *end)
        yield from _scan.variants(settings, io)
