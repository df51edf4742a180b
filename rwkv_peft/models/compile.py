"""Blocks compiled by torch.compile, one code for all that are alike."""

from collections.abc import Callable
from typing import Any

import torch

from rwkv_peft.models.base import RWKV
from rwkv_peft.models.layers import Block


def compile_blocks(
    model: RWKV,
    *,
    dynamic: bool | None = False,
    backend: str = "inductor",
    on_failure: Callable[[str], None] | None = None,
) -> None:
    """Has the blocks of a model compiled when they are next trained.

    With `grad_cp` the compiled backward recomputes all that a block's inputs give.

    Args:
        dynamic: one code for rows of all lengths, rather than one for each shape; None: as soon as
            a second length comes.
        backend: of `torch.compile`.
        on_failure: is told why a block could not be compiled; blocks then run as they are. None:
            the error is raised.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    compiled = torch.compile(
        Block.forward,
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
        # dropout draws the numbers that it draws without a compiler
        options={"fallback_random": True} if backend == "inductor" else None,
    )

    def run(*args: Any) -> Any:
        # both are read when a block is compiled. Backward is compiled with forward, so that nothing
        # was added to a gradient when it fails
        with torch._functorch.config.patch(
            activation_memory_budget=0.0 if model.grad_cp else 1.0,
            force_non_lazy_backward_lowering=True,
        ):
            try:
                return compiled(*args)
            except (TorchDynamoException, InductorError) as error:
                if on_failure is None:
                    raise
                # its second line, where the first says only in which part of the compiler
                first, *others = str(error).strip().splitlines()
                on_failure(others[0] if first.endswith(":") and others else first)
        model.compiled = None
        return model.run_block(*args)

    model.compiled = run
