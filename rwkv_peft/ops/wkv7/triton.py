"""WKV-7 by Triton kernels: how the six stages are started, and with which settings."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rwkv_peft.ops.triton import Launcher, Scan, Settings, Variant, start_chunks
from rwkv_peft.ops.triton_kernels import BF16, FP32
from rwkv_peft.ops.wkv7 import triton_kernels as kernels
from rwkv_peft.ops.wkv7.stages import Stages, register

_BF16 = Settings(64, BF16, "ieee")
# float16 has the digits but not the range for the operands
_WIDE = Settings(16, FP32, "ieee")

_chunk_forward = Launcher(kernels.chunk_forward, num_warps=8)
_scan = Scan(16, num_warps=4, stages=4, has_transition=True)
_output = Launcher(kernels.output, num_warps=4)
_chunk_backward = Launcher(kernels.chunk_backward, num_warps=4)
_gradients = {
    # eight warps would need 1 KiB more of shared memory than an Ada GPU has
    BF16: Launcher(kernels.gradients, num_warps=4),
    # and four have not the registers for float32
    FP32: Launcher(kernels.gradients, num_warps=8),
}


def settings_for(dtype: torch.dtype) -> Settings:
    """How inputs of a type are computed."""
    # Triton's interpreter has no arithmetic of bf16
    return _BF16 if dtype == torch.bfloat16 and _output.is_compiled else _WIDE


def stages(settings: Callable[[torch.dtype], Settings] = settings_for) -> Stages:
    """The stages as launches of the kernels, with `settings` of a type of inputs."""

    def start(launcher: Launcher, tensors: tuple[Tensor | None, ...], *flags: bool) -> None:
        like = tensors[0]
        assert like is not None
        start_chunks(launcher, settings(like.dtype), tensors, like, *flags)

    def chunk_forward(*tensors: Tensor | None) -> None:
        segment_ids, inverse = tensors[6], tensors[-1]
        start(_chunk_forward, tensors, segment_ids is not None, inverse is not None)

    def output(readout: Tensor, states: Tensor, y: Tensor) -> None:
        start_chunks(_output, settings(y.dtype), (readout, states, y), y)

    def chunk_backward(*tensors: Tensor | None) -> None:
        start(_chunk_backward, tensors, tensors[4] is not None)

    def gradients(r: Tensor, *others: Tensor | None) -> None:
        launcher = _gradients[settings(r.dtype).operand]
        # the last state is not needed: what decays give to it is made again
        start(launcher, (r, *others[:8], *others[9:]), others[5] is not None)

    def scan(reverse: bool) -> Callable[..., None]:
        def state(*tensors: Tensor | None) -> None:
            added = tensors[1]
            assert added is not None
            _scan(settings(added.dtype), *tensors, reverse=reverse)  # type: ignore[arg-type]

        return state

    return Stages(
        chunk_length=lambda dtype, device: settings(dtype).chunk,
        chunk_forward=chunk_forward,
        state_forward=scan(reverse=False),
        output=output,
        chunk_backward=chunk_backward,
        state_backward=scan(reverse=True),
        gradients=gradients,
    )


wkv7_triton = register("triton", stages())


def variants() -> Iterator[Variant]:
    """All that these kernels are compiled to."""
    for dtype in (torch.bfloat16, torch.float32):
        settings = settings_for(dtype)
        io, wide, segments = "*bf16" if dtype == torch.bfloat16 else "*fp32", "*fp32", "*i32"
        end, numbers = settings[1:], ("i32",) * 3
        sizes = (settings.chunk, 64)
        scratch = (io, io, wide)
        yield (
            _chunk_forward,
            (*(io,) * 6, segments, io, *scratch, io, io, *numbers, *sizes, True, True, *end),
        )
        yield (
            _chunk_backward,
            (*(io,) * 4, segments, io, io, *scratch, *numbers, *sizes, True, *end),
        )
        launcher = _gradients[settings.operand]
        yield launcher, (*(io,) * 6, segments, *(io,) * 10, *numbers, *sizes, True, *end)
        yield _output, (io, io, io, *numbers, *sizes, *end)
        yield from _scan.variants(settings, io)
