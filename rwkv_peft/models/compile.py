"""Blocks compiled by torch.compile, one code for all that are alike."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch

from rwkv_peft.models.base import RWKV
from rwkv_peft.models.layers import Block
from rwkv_peft.models.recompute import recompute

# codes that are kept of a function, each for one shape
MAX_SHAPES = 64
# numbers of a row that a kernel holds while it is normed; of more than 1024 the compiler by itself
# reads a row once for its mean and once more to norm it
MAX_ROW = 8192


@cache
def make_choices() -> Any:
    """The compiler's choices, but for rows of up to `MAX_ROW` numbers."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            is_row = features.get_reduction_hint() == ReductionHint.INNER
            numbers = features.reduction_numel
            if is_row and V.graph.sizevars.statically_known_leq(numbers, MAX_ROW):
                return True
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

        def uuid(self) -> str:
            # of what is compiled and kept
            return str(MAX_ROW)

    return Choices()


def make_choices_hold() -> AbstractContextManager[Any]:
    """Has this thread compile by `make_choices`, whatever it compiled by before."""
    from torch._inductor.virtualized import V

    handler: AbstractContextManager[Any] = V.set_choices_handler(make_choices())
    return handler


OPTIONS: dict[str, Any] = {
    # PyTorch 2.10 and 2.11 were seen to give NaN where sums over rows and over columns become one
    # kernel, which happens from 4096 rows on (pytorch/pytorch#190796)
    "triton.mix_order_reduction": False,
    # kernels that write in place are timed together with copies of what they write to, which are
    # what decided between their variants, up to three times as slow
    "inplace_buffers": False,
    "inductor_choices_class": make_choices,
}


def compile_function(
    function: Callable[..., Any], *, backend: str = "inductor", **options: Any
) -> Callable[..., Any]:
    """A function compiled anew for each shape, so that what it gives depends on no earlier shape.

    Code for several lengths at once takes minutes to compile on a GPU, and is tuned for the length
    that came first: a run that goes on in its middle would get another code.

    Args:
        backend: of `torch.compile`.
        options: of the backend "inductor", beside `OPTIONS`; others take none.
    """
    is_inductor = backend == "inductor"
    chosen = OPTIONS | options if is_inductor else None
    compiled: Callable[..., Any] = torch.compile(
        function, fullgraph=True, dynamic=False, backend=backend, options=chosen
    )

    def run(*args: Any) -> Any:
        with (
            torch._dynamo.config.patch(recompile_limit=MAX_SHAPES),
            make_choices_hold() if is_inductor else nullcontext(),
        ):
            return compiled(*args)

    return run


def compile_blocks(
    model: RWKV,
    *,
    backend: str = "inductor",
    on_failure: Callable[[str], None] | None = None,
) -> None:
    """Has the blocks of a model compiled when they are next trained.

    With `grad_cp` the compiled backward recomputes all that a block's inputs give. Blocks of which
    several processes have parts are gathered around what is compiled.

    Args:
        backend: of `torch.compile`.
        on_failure: is told why a block could not be compiled; blocks then run as they are. None:
            the error is raised.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    compiled = compile_function(
        # dropout draws the numbers that it draws without a compiler
        Block.forward,
        backend=backend,
        fallback_random=True,
    )

    def run(block: Any, *args: Any) -> Any:
        # both are read when a block is compiled. Backward is compiled with forward, so that nothing
        # was added to a gradient when it fails
        with torch._functorch.config.patch(
            activation_memory_budget=0.0 if model.grad_cp else 1.0,
            force_non_lazy_backward_lowering=True,
        ):
            try:
                with model.host.keep_saved(args[0]) if model.host else nullcontext():
                    return compiled(block, *args)
            except (TorchDynamoException, InductorError) as error:
                if on_failure is None:
                    raise
                # its second line, where the first says only in which part of the compiler
                first, *others = str(error).strip().splitlines()
                on_failure(others[0] if first.endswith(":") and others else first)
        model.compiled = None
        forward = partial(Block.forward, block)
        return recompute(forward, *args, host=model.host) if model.grad_cp else forward(*args)

    def call(block: Any, *args: Any) -> Any:
        if not hasattr(block, "unshard"):
            return run(block, *args)
        # its weights are gathered around its call
        block.forward = partial(run, block)
        try:
            return block(*args)
        finally:
            del block.forward

    model.compiled = call
