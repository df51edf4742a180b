"""What `ops.py` measures beside our backends: recurrences of other programs, and forms of our own.

The CUDA backend of WKV-7 chooses between two forms by the number of heads; here are both."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.ops import fla
from rwkv_peft.ops.dispatch import Backend, Request, is_installed

Kernel = Callable[..., tuple[Tensor, Tensor]]


def _load_form(name: str) -> Kernel:
    from rwkv_peft.ops.wkv7.cuda import KERNELS, operator

    is_persistent = name == "persistent"
    own_name = f"cuda_{name.replace('-', '_')}"
    return operator(own_name, KERNELS.load, KERNELS.chunk_length, lambda plan: is_persistent)


def _form_objection(request: Request) -> str | None:
    from rwkv_peft.ops.wkv7.cuda import KERNELS, objection

    if (why := objection(request)) is not None:
        return why
    has_both = KERNELS.chunk_length(request.dtype, request.device) == 64
    return None if has_both else "has one form alone there"


def _load_flashrwkv2() -> Kernel:
    from flashrwkv2.tmix.wkv7.tilelang import tmix_wkv7_recurrent

    def wkv7(r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        *inputs, state, _ = others
        B, T, H, N = r.shape
        start = r.new_zeros(B, H, N, N, dtype=torch.float32) if state is None else state.mT
        ends = torch.arange(B + 1, dtype=torch.int32, device=r.device) * T
        rows = (x.flatten(0, 1).contiguous() for x in (r, *inputs))
        y, last = tmix_wkv7_recurrent(*rows, start.contiguous(), ends)
        return y.view(r.shape), last.mT

    return wkv7


def _flashrwkv2_objection(request: Request) -> str | None:
    if not (is_installed("flashrwkv2") and is_installed("tilelang")):
        return "is not installed"
    return None if request.dtype == torch.bfloat16 else "takes bf16 alone"


def _load_fla_recurrent() -> Kernel:
    from fla.ops.rwkv6 import fused_recurrent_rwkv6

    def wkv6(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, _: Tensor
    ) -> tuple[Tensor, Tensor]:
        start = None if state is None else state.mT.contiguous()
        log_decay = -w.float().exp()
        y, last = fused_recurrent_rwkv6(
            r, k, v, log_decay, u, scale=1.0, initial_state=start, output_final_state=True
        )
        return y.to(r.dtype), last.mT.float()

    return wkv6


def _load_rwkv() -> Kernel:
    import rwkv
    from torch.utils.cpp_extension import load

    sources = [
        Path(rwkv.__file__).with_name("cuda") / name for name in ("rwkv6_op.cpp", "rwkv6.cu")
    ]
    load(
        name="rwkv6",
        sources=[*map(str, sources)],
        extra_cuda_cflags=["-D_N_=64", "-O3", "--use_fast_math", "--extra-device-vectorization"],
        is_python_module=False,
    )

    @torch.no_grad()
    def wkv6(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, _: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, T, H, N = r.shape
        assert B == 1, "takes one row"
        last = r.new_zeros(B, H, N, N, dtype=torch.float32) if state is None else state.clone()
        decay, y = torch.exp(-torch.exp(w.float())), torch.empty_like(r)
        torch.ops.rwkv6.forward_bf16(B, T, H * N, H, last, r, k, v, decay, u, y)
        return y, last

    return wkv6


def _rwkv_objection(request: Request) -> str | None:
    if not is_installed("rwkv") or shutil.which("nvcc") is None:
        return "needs the package rwkv and nvcc"
    return None if request.dtype == torch.bfloat16 else "is measured in bf16 alone"


# measured without packing
PEERS: dict[str, tuple[Backend, ...]] = {
    "wkv7": (
        *(
            Backend(f"cuda {form}", functools.partial(_load_form, form), _form_objection, "")
            for form in ("chunk-parallel", "persistent")
        ),
        Backend("flashrwkv2", _load_flashrwkv2, _flashrwkv2_objection, "TileLang, untuned"),
    ),
    "wkv6": (
        Backend("fla recurrent", _load_fla_recurrent, fla.objection, "token by token, in Triton"),
        Backend("rwkv", _load_rwkv, _rwkv_objection, "token by token, in CUDA, forward alone"),
    ),
}
