"""A forward and a backward pass of the CUDA kernels, for NVIDIA's checker of kernels to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py

Each operator in bf16 and fp32, over one document and over packed ones, with a state given: 130
tokens, two more than whole chunks. WKV-7 in bf16 both chunk-parallel and persistent.
`compute-sanitizer` is part of the CUDA toolkit. Without the variable PyTorch cuts its tensors out
of larger allocations, and what is read or written beside one of them is not noticed. The kernels
that the cache has not are compiled first.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.cases import Case, run
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.wkv7.cuda import KERNELS, operator

DTYPES = (torch.bfloat16, torch.float32)
TOKENS, HEADS, HEAD_SIZE = 130, 2, 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs each case and says so; exits with 1 if a value is not finite, or without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    persistent = operator("sanitized", KERNELS.load, KERNELS.chunk_length, lambda plan: True)
    for op, dtype, packed in itertools.product(options.ops, DTYPES, (False, True)):
        backend = next(b for b in OPERATORS[op].table if b.name == "cuda")
        rows = "packed" if packed else "one document"
        name = f"{op}, {str(dtype).removeprefix('torch.')}, {rows}"
        if (why := backend.objection(Request(device, dtype, HEAD_SIZE))) is not None:
            sys.exit(f"error: {name}: the CUDA backend {why}")
        case = OPERATORS[op].make_case(B=1, T=TOKENS, H=HEADS, packed=packed).to(dtype, device)
        check(name, case, backend.load())
        if op == "wkv7" and KERNELS.chunk_length(dtype, device) == 64:
            check(f"{name}, persistent", case, persistent)


def check(name: str, case: Case, kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Both directions, finished before the next; exits with 1 if a value is not finite."""
    found = run(case, kernel)
    torch.cuda.synchronize()
    wrong = [key for key, x in found.items() if not bool(x.isfinite().all())]
    if wrong:
        sys.exit(f"error: {name}: {', '.join(wrong)} not finite")
    print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
