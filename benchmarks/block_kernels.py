"""The kernels that PyTorch's compiler makes of a block for an H200, on a machine without a GPU.

    python benchmarks/block_kernels.py [--sizes 1.5b] [--ctx_len 4096] [--methods lora state none]

A block is traced on the CPU, forward and backward are lowered as for the GPU, and the kernels in
the code that comes out are listed, but for products and the recurrence; none is built or run. What
a kernel loads twice counts twice, though a cache may have it. This reaches into PyTorch, and was
written for PyTorch 2.13.
"""

import argparse
import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor
from gpu_step import SIZES, config_of
from report import report
from step import OPTIONS
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate

from rwkv_peft.methods.attach import attach
from rwkv_peft.models import build
from rwkv_peft.models.compile import OPTIONS as COMPILER
from rwkv_peft.models.compile import make_choices_hold
from rwkv_peft.models.layers import Block, PackingInfo
from rwkv_peft.ops.wkv7.cuda import wkv7_cuda

GPU = torch.device("cuda")
H200 = SimpleNamespace(
    name="H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=140 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=60 << 20,
    warp_size=32,
    gcnArchName="",
)
# what the compiler asks of a GPU
ANSWERS: dict[str, Any] = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_properties": lambda *_: H200,
    "torch.cuda._get_device_properties": lambda *_: H200,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "torch.cuda.set_rng_state": lambda *_: None,
    "torch.utils._triton.triton_hash_with_backend": lambda: "",
    "torch.compiler.is_compiling": lambda: True,
}


def lower(code: list[str], mode: FakeTensorMode, graph: Any, inputs: list[Tensor]) -> Any:
    """Adds the code of a traced graph for a GPU to `code`; gives the graph."""

    def on_gpu(x: Any) -> Any:
        return GPU if isinstance(x, torch.device) else x

    moved = copy.deepcopy(graph)
    for node in moved.graph.nodes:
        node.args, node.kwargs = (map_aggregate(x, on_gpu) for x in (node.args, node.kwargs))
    moved.recompile()
    with mode, torch.no_grad():
        there = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU) for x in inputs
        ]
        moved = make_fx(moved)(*there)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        post_grad_passes(moved, False)
        lowering = GraphLowering(moved, example_inputs=there)
        with V.set_graph_handler(lowering):
            lowering.run(*there)
            code.append(lowering.codegen()[0].value)
    return graph


def make(size: str, method: Any) -> nn.Module:
    """The second block of a model, with what is trained."""
    model = build(config_of(size), op="reference").requires_grad_(False)
    # one number for all, as the values do not count
    replace(model, lambda x: torch.zeros((), dtype=torch.bfloat16).expand(x.shape))
    for block in model.blocks:
        block.att.kernel = wkv7_cuda
    if method != "state":
        attach(model, method, OPTIONS.get(method, {}))
    found: nn.Module = model.blocks[1]
    return found


def replace(owner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Gives a module other parameters in the place of its own."""
    for module in owner.modules():
        for name, x in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(change(x), requires_grad=x.requires_grad)


def trace(block: Any, ctx_len: int) -> list[str]:
    """The code of a block's forward and of its backward."""
    code: list[str] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        replace(block, lambda x: torch.empty(x.shape, dtype=x.dtype))
        parameters = dict(block.named_parameters())

        def forward(x: Tensor, carry: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(parameters, values, strict=True))
            with nn.utils.stateless._reparametrize_module(block, named):
                y, carried, state = Block.forward(block, x, carry, None, PackingInfo())
            assert carried is not None
            return y, carried, *(part.detach() for part in state)

        width = block.ln1.weight.shape[0]
        x, carry = (torch.empty(1, ctx_len, width).bfloat16() for _ in range(2))
        inputs = [x.requires_grad_(), carry.flatten(0, 1).requires_grad_()]
        compiler = partial(lower, code, mode)
        run = aot_function(
            forward,
            compiler,
            compiler,
            decompositions=select_decomp_table(),
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        )
        with mock.patch.object(FakeTensor, "copy_", lambda self, *_, **__: self):
            found = run(*inputs, *parameters.values())[:2]
            needed = [*inputs, *(p for p in parameters.values() if p.requires_grad)]
            torch.autograd.grad(found, needed, [torch.empty_like(y) for y in found])
    return code


def kernels(code: str, vectors: int) -> Iterator[tuple[str, float, float]]:
    """Name of each kernel that is not a product, its loads and its stores in (T, D)."""
    made = re.findall(r"(triton_\w+) = async_compile.triton\('\w+', '''(.*?)'''", code, re.DOTALL)
    sources = {name: text[text.index("def ") :] for name, text in made}
    for name, given in re.findall(r"^ +(triton_\w+)\.run\((.*)\)$", code, re.MULTILINE):
        source = sources[name]
        sizes = [int(x) for x in re.findall(r"(?<=, )\d+(?=,)", given)]
        # by the whole index, or by all parts of it, and by that of what is reduced
        whole = re.findall(r"(x\d) = xindex$", source, re.MULTILINE)
        parts = re.findall(r"(x\d) = .*xindex.*[%/]", source)
        accesses = [
            kind
            for kind, place in re.findall(r"tl\.(load|store)\(\w+ \+ \((.*?)\),", source)
            if (
                any(x in place for x in whole)
                or (len(parts) > 1 and all(x in place for x in parts))
            )
            and (len(sizes) == 1 or "r0_" in place)
        ]
        share = math.prod(sizes) / vectors
        yield name, accesses.count("load") * share, accesses.count("store") * share


def rows_of(size: str, ctx_len: int, method: str) -> Iterator[str]:
    """A table row for each kernel, and one for all of a direction."""
    block = make(size, method)
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        options = {"force_disable_caches": True, "fallback_random": True, **COMPILER}
        stack.enter_context(inductor.patch(options))
        stack.enter_context(make_choices_hold())
        codes = trace(block, ctx_len)
    for direction, code in zip(("forward", "backward"), codes, strict=True):
        found = list(kernels(code, ctx_len * config_of(size).n_embd))
        start = f"| {size} | {ctx_len} | {method} | {direction}"
        for name, loads, stores in found:
            yield f"{start} | {name} | {loads:.1f} | {stores:.1f} |"
        loads, stores = (sum(x[i] for x in found) for i in (1, 2))
        yield f"{start} | all {len(found)} | {loads:.1f} | {stores:.1f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=["1.5b"], choices=list(SIZES))
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        f"PyTorch {torch.__version__}, as for an H200",
        "",
        "| size | tokens | method | direction | kernel | loads of (T, D) | stores |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in options.sizes:
        for method in options.methods:
            lines += rows_of(size, options.ctx_len, method)
    report(lines, options.output)


if __name__ == "__main__":
    main()
