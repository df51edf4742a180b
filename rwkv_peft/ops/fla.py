"""What the adapters of flash-linear-attention share.

fla keeps states as (K, V), the transpose of ours, and takes packed documents as `cu_seqlens`.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_peft.ops.dispatch import Request, is_installed
from rwkv_peft.ops.segments import find_documents

NOTE = "Triton kernels of flash-linear-attention, tuned at the first step, which takes minutes"


def objection(request: Request) -> str | None:
    """Why fla cannot serve a request; None if it can."""
    if request.device.type == "cpu":
        return "needs a GPU"
    if not is_installed("fla"):
        return "is not installed (pip install 'rwkv-peft[fla]')"
    if request.dtype != torch.bfloat16:
        # its float32 products are rounded to TF32, its float16 ones overflow the error budget
        return f"is exact enough in bf16 alone, not in {str(request.dtype).removeprefix('torch.')}"
    return None


def run_fla(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) in the dtype of the first tensor, last state (B, H, N, N) float32.

    Args:
        kernel: a `chunk_*` function of fla, called with `tensors` as a list.
        tensors: (B, T, H, N).
        initial_state, segment_ids: as operators take them.
    """
    r = tensors[0]
    state = None if initial_state is None else initial_state.mT.contiguous()
    if segment_ids is None:
        y, last = kernel(list(tensors), initial_state=state, output_final_state=True)
        return y.to(r.dtype), last.mT.float()
    # all rows one after the other are one row of fla, and every document has a state of its own
    packed = find_documents(segment_ids)
    if state is not None:
        others = state.new_zeros(len(packed.cu_seqlens) - 1, *state.shape[1:])
        state = others.index_copy(0, packed.first, state)
    y, last = kernel(
        [x.flatten(0, 1).unsqueeze(0) for x in tensors],
        initial_state=state,
        output_final_state=True,
        cu_seqlens=packed.cu_seqlens,
    )
    return y.view(r.shape).to(r.dtype), last[packed.last].mT.float()


def cap_autotuning(num: int) -> None:
    """Lets fla's kernels for RWKV choose among `num` of their settings instead of all.

    Their first calls then take seconds instead of minutes, but the best setting may be left out.
    """
    import fla.ops.rwkv6
    import fla.ops.rwkv7  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for tuner in vars(module).values():
                while tuner is not None and not isinstance(tuner, Autotuner):
                    tuner = getattr(tuner, "fn", None)  # a decorator inside
                if tuner is not None:
                    tuner.configs = tuner.configs[:: -(-len(tuner.configs) // num)]
