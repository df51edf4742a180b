"""Time and memory of training steps with an adapter: our fused layers against peft's own.

    python benchmarks/methods.py [--size 1.5b] [--methods lora miss] [--ctx_len 1024 4096]

Random bf16 weights, rows of random tokens, rank 32 on the default targets, with and without
recomputing blocks in backward: forward, backward, clip, AdamW on float32 masters. All kinds exist
at once and take turns; medians. The floor is a step whose only adapter is in the first layer: what
is left if adapters cost nothing. Memory is the peak of allocated tensors with one alone. A row is
timed only if the losses agree to 1 %.
"""

import argparse
import gc
import statistics
from pathlib import Path

import torch
from gpu_step import SIZES, device_name, make_model, make_optimizer, random_batch, timed_step
from report import report

from rwkv_peft.data.batching import Batch
from rwkv_peft.methods import Method
from rwkv_peft.models.base import RWKV
from rwkv_peft.training.optim import Optimizer

WARM_UP = 3


# what a model is given: peft's own layers, ours, and next to nothing
KINDS = ("peft", "fused", "floor")
FLOOR = {"r": 32, "target_modules": ["blocks.0.att.receptance"]}


def prepare(size: str, method: Method, kind: str, *, grad_cp: bool) -> tuple[RWKV, Optimizer]:
    """A model with an adapter, and its optimizer."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = make_model(size, "auto", device)
    model.grad_cp = grad_cp
    options = FLOOR if kind == "floor" else None
    return model, make_optimizer(model, method, options, is_fused=kind != "peft")


def peak_of(size: str, method: Method, batch: Batch, kind: str, *, grad_cp: bool) -> float:
    """GiB of allocated tensors at the peak of a step; nan on a CPU, which does not count them."""
    if not torch.accelerator.is_available():
        return float("nan")
    gc.collect()
    torch.accelerator.empty_cache()
    model, optimizer = prepare(size, method, kind, grad_cp=grad_cp)
    timed_step(model, optimizer, batch)
    torch.accelerator.reset_peak_memory_stats()
    timed_step(model, optimizer, batch)
    return torch.accelerator.max_memory_allocated() / 2**30


def row(size: str, method: Method, rows: int, ctx_len: int, rounds: int, *, grad_cp: bool) -> str:
    """A table row."""
    batch = random_batch(rows, ctx_len, SIZES[size][-1])
    peaks = [peak_of(size, method, batch, kind, grad_cp=grad_cp) for kind in KINDS[:2]]
    models = [prepare(size, method, kind, grad_cp=grad_cp) for kind in KINDS]
    start = f"| {method} | {rows} × {ctx_len} | {int(grad_cp)} | "
    steps: list[list[tuple[float, float]]] = [[] for _ in KINDS]
    for _ in range(rounds + WARM_UP):
        for found, (model, optimizer) in zip(steps, models, strict=True):
            found.append(timed_step(model, optimizer, batch))
    losses = [found[-1][0] for found in steps]
    if max(losses) - min(losses) > 0.01 * losses[0]:
        return start + f"not timed: losses {losses} | | | | | |"
    times = [statistics.median(s for _, s in found[WARM_UP:]) * 1e3 for found in steps]
    return (
        start + " | ".join(f"{x:.1f}" for x in times) + f" | {times[0] / times[1]:.2f} | "
        f"{peaks[0]:.2f} | {peaks[1]:.2f} |"
    )


def main(args: list[str] | None = None) -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.5b", choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["lora", "miss"])
    parser.add_argument("--ctx_len", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(args)
    lines = [
        f"{device_name()}, torch {torch.__version__}, model {options.size}",
        "",
        "| method | rows × ctx_len | grad_cp | peft ms | fused ms | floor ms | times faster | "
        "peft GiB | fused GiB |",
        "|---|---|---|" + "---|" * 6,
    ]
    for method in options.methods:
        for ctx_len in options.ctx_len:
            for grad_cp in (False, True):
                setting = (options.size, method, options.rows, ctx_len, options.rounds)
                lines.append(row(*setting, grad_cp=grad_cp))
                print(lines[-1], flush=True)
    report(lines, options.output)


if __name__ == "__main__":
    main()
