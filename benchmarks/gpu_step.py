"""Time and memory of training steps on a GPU, for the shapes of the released models.

    python benchmarks/gpu_step.py [--sizes 0.1b 1.5b] [--ops torch fla] [--methods lora none]

Random bf16 weights, random tokens, one row of 1024 tokens, LoRA of rank 32 on the default targets
or full tuning (none), blocks recomputed in backward: forward, backward, clip, AdamW on float32
values. The backends are checked against each other first: one whose loss differs by more than 1 %
from the first's is not timed. Memory is the peak of allocated tensors in GiB.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from report import report
from torch import nn

from rwkv_peft.data.batching import Batch
from rwkv_peft.methods import Method
from rwkv_peft.methods.attach import attach
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.quant import Storage, quantise, stored_layers
from rwkv_peft.training.hosted import HostOptimizer
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.step import Step, full_step

# layers, width, low-rank widths of w, a, v, g, vocabulary: the bundled model, and released files
SIZES = {
    "bundled": (6, 256, (32, 32, 32, 64), 5120),
    "0.1b": (12, 768, (64, 64, 32, 128), 65536),
    "0.4b": (24, 1024, (64, 64, 32, 128), 65536),
    "1.5b": (24, 2048, (96, 96, 64, 256), 65536),
    "2.9b": (32, 2560, (96, 96, 64, 320), 65536),
    "7.2b": (32, 4096, (128, 128, 96, 480), 65536),
    "13.3b": (61, 4096, (192, 192, 128, 384), 65536),
}
TOKENS = 1024
ADAPTERS: dict[str, dict[str, int]] = {"lora": {"r": 32, "lora_alpha": 32}, "miss": {"r": 32}}


def config_of(size: str) -> ModelConfig:
    """The shape of a released model."""
    n_layer, n_embd, ranks, vocab_size = SIZES[size]
    return ModelConfig(
        "x070",
        n_layer,
        n_embd,
        n_embd,
        4 * n_embd,
        64,
        vocab_size,
        dict(zip("wavg", ranks, strict=True)),
        False,
    )


def make_model(
    size: str, op: str, device: torch.device, quant: str = "none", *, has_head: bool = False
) -> RWKV:
    """A model of a released shape with random weights of a realistic scale; float32 on a CPU.

    Its tensors are drawn one after the other, and the projections stored as `quant` says, with the
    head if asked for.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build(config_of(size), op=op, device=device, dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(0)
    layers = [] if quant == "none" else stored_layers(model, has_head=has_head)
    stored = {name for name, _ in layers}
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        drawn = torch.empty(parameter.shape, device=device, dtype=dtype)
        drawn.normal_(0, 0.5 / parameter.shape[-1] ** 0.5, generator=generator)
        if "ln" in name and name.endswith("weight"):
            drawn.fill_(1.0)
        if owner in stored:
            model.set_submodule(owner, quantise(drawn, Storage(quant, dtype)))
        else:
            setattr(model.get_submodule(owner), leaf, nn.Parameter(drawn))
    model.grad_cp = True
    return model


def make_optimizer(
    model: RWKV,
    method: Method,
    options: dict[str, Any] | None = None,
    *,
    is_fused: bool = True,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Prepares a model for full tuning (none) or with an adapter, of rank 32 if left open.

    What is trained stays in the model's type unless another is asked for.
    """
    torch.manual_seed(0)
    trained = attach(model, method, options or ADAPTERS.get(method, {}), is_fused=is_fused)
    for parameter in trained.values():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return optimizer_over(trained, is_full=method == "none")


def optimizer_over(
    trained: Mapping[str, nn.Parameter],
    *,
    is_full: bool,
    name: str = "adamw",
    accumulates: bool = True,
    on_host: bool = False,
) -> Optimizer:
    """AdamW as a run has it, or another, without decay and with one rate for all."""
    return (HostOptimizer if on_host else Optimizer)(
        trained,
        Grouping(plain=trained if is_full else (), optimizer=name),
        betas=(0.9, 0.99),
        eps=1e-8,
        grad_clip=1.0,
        accumulates=accumulates,
    )


def timed_step(
    model: RWKV, optimizer: Optimizer, batch: Batch, step: Step = full_step
) -> tuple[float, float]:
    """Mean loss and seconds of an optimizer step of one micro-batch."""
    synchronize()
    started = time.perf_counter()
    output = step(
        model,
        batch,
        state=None,
        divisor=batch.num_trained,
        l2wrap=1e-4,
        backward=optimizer.backward,
    )
    optimizer.clip().tolist()
    optimizer.step(lr=0.0)
    synchronize()
    seconds = time.perf_counter() - started
    return output.loss_sum.item() / output.num_tokens, seconds


def synchronize() -> None:
    """Waits for the device, if there is one that works by itself."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def random_batch(rows: int, tokens: int, vocab_size: int) -> Batch:
    """Random tokens, all trained."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, vocab_size, (rows, tokens + 1), generator=generator)
    return Batch(drawn[:, :-1], drawn[:, 1:], [1])


def device_name() -> str:
    """Of the GPU, if there is one, or what is known of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def measure(size: str, method: Method, op: str, rounds: int) -> tuple[float, float, float]:
    """Loss, median seconds of a step and peak GiB."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model = make_model(size, op, device)
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    optimizer, batch = make_optimizer(model, method), random_batch(1, TOKENS, SIZES[size][-1])
    steps = [timed_step(model, optimizer, batch) for _ in range(rounds + 3)][3:]
    peak = torch.accelerator.max_memory_allocated() / 2**30
    return steps[-1][0], statistics.median(seconds for _, seconds in steps), peak


def rows(size: str, method: Method, ops: list[str], rounds: int) -> list[str]:
    """A table row a backend."""
    found, first = [], None
    for op in ops:
        start = f"| {method} | {size} | {op} | "
        try:
            loss, seconds, peak = measure(size, method, op, rounds)
        except torch.OutOfMemoryError:
            found.append(start + "out of memory | | | |")
            continue
        first = loss if first is None else first
        if abs(loss - first) > 0.01 * first:
            found.append(start + f"not timed: the loss differs | | | {loss:.4f} |")
            continue
        found.append(
            start + f"{seconds * 1e3:.0f} | {TOKENS / seconds:.0f} | {peak:.2f} | {loss:.4f} |"
        )
    return found


def main() -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[1:], choices=list(SIZES))
    parser.add_argument("--ops", nargs="+", default=["torch", "fla"])
    parser.add_argument("--methods", nargs="+", default=["lora", "none"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        f"{device_name()}, torch {torch.__version__}, bf16, 1 row of {TOKENS} tokens",
        "",
        "| method | size | op | ms a step | tokens/s | peak GiB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in options.methods:
        for size in options.sizes:
            lines += rows(size, method, options.ops, options.rounds)
            print(lines[-1], flush=True)
    report(lines, options.output)


if __name__ == "__main__":
    main()
