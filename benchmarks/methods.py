"""Time and memory of training steps with an adapter: our fused layers against peft's own.

    python benchmarks/methods.py [--size 1.5b] [--methods lora miss] [--ctx_len 1024 4096]

Random bf16 weights (float32 on a CPU), rows of random tokens, rank 32 on the default targets, with
and without recomputing blocks in backward: forward, backward, clip, AdamW. The kinds are

- peft: peft's own layers as it makes them for a bf16 model, adapters in float32, trained as they
  are; a layer casts x to float32, multiplies there (in TF32, which is allowed here) and casts back;
- peft bf16: peft's own layers with adapters in bf16, whose float32 values are the optimizer's;
- fused: the same with our layers;
- floor: an adapter in the first layer only, what is left if adapters cost nothing.

Times are medians of steps that all kinds take in turns, and a ratio is the median of the rounds'
own, as a host may be slow for minutes; both are printed only if the losses agree to 1 %. A second
table says what one step of a kind alone asks of the device: the sum of the durations of its
kernels, their number, and the peak of allocated tensors. A step that takes longer than its kernels
waits for the host to launch them. A CPU knows none of these (nan).
"""

import argparse
import gc
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_step import SIZES, device_name, make_model, make_optimizer, random_batch, timed_step
from report import report
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rwkv_peft.data.batching import Batch
from rwkv_peft.methods import Method
from rwkv_peft.models.base import RWKV
from rwkv_peft.training.optim import Optimizer

WARM_UP = 3
CONTROLS = ("peft", "peft bf16")
KINDS = (*CONTROLS, "fused", "floor")
FLOOR = {"r": 32, "target_modules": ["blocks.0.att.receptance"]}


class Setting(NamedTuple):
    """What the kinds are compared on."""

    size: str
    method: Method
    rows: int
    ctx_len: int
    grad_cp: bool

    @property
    def batch(self) -> Batch:
        """Random tokens."""
        return random_batch(self.rows, self.ctx_len, SIZES[self.size][-1])

    def __str__(self) -> str:
        return f"| {self.method} | {self.rows} × {self.ctx_len} | {int(self.grad_cp)} |"


def prepare(setting: Setting, kind: str) -> tuple[RWKV, Optimizer]:
    """A model with an adapter, and its optimizer."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = make_model(setting.size, "auto", device)
    model.grad_cp = setting.grad_cp
    optimizer = make_optimizer(
        model,
        setting.method,
        FLOOR if kind == "floor" else None,
        is_fused=not kind.startswith("peft"),
        dtype=torch.float32 if kind == "peft" else None,
    )
    return model, optimizer


class Times(NamedTuple):
    """Of steps that the kinds took in turns.

    Attributes:
        milliseconds: median of each kind.
        ratios: to that of the fused layers, median of those of a round.
    """

    milliseconds: list[float]
    ratios: dict[str, float]


def times_of(setting: Setting, rounds: int) -> Times:
    """Times of the steps of each kind.

    Raises:
        ValueError: their losses differ.
    """
    models, batch = [prepare(setting, kind) for kind in KINDS], setting.batch
    steps: list[list[tuple[float, float]]] = [[] for _ in KINDS]
    for _ in range(rounds + WARM_UP):
        for found, (model, optimizer) in zip(steps, models, strict=True):
            found.append(timed_step(model, optimizer, batch))
    losses = [found[-1][0] for found in steps]
    if not max(losses) - min(losses) <= 0.01 * losses[0]:
        raise ValueError(f"losses {losses}")
    seconds = {
        kind: [s for _, s in found[WARM_UP:]] for kind, found in zip(KINDS, steps, strict=True)
    }
    return Times(
        [statistics.median(taken) * 1e3 for taken in seconds.values()],
        {
            kind: statistics.median(x / y for x, y in zip(taken, seconds["fused"], strict=True))
            for kind, taken in seconds.items()
        },
    )


def work_of(setting: Setting, kind: str) -> tuple[float, float, float]:
    """Milliseconds of kernels, their number and the peak GiB of a step of a kind alone."""
    if not torch.cuda.is_available():
        return float("nan"), float("nan"), float("nan")
    gc.collect()
    torch.cuda.empty_cache()
    (model, optimizer), batch = prepare(setting, kind), setting.batch
    timed_step(model, optimizer, batch)
    torch.cuda.reset_peak_memory_stats()
    timed_step(model, optimizer, batch)
    peak = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        timed_step(model, optimizer, batch)
    kernels = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        # copies and fills
        and not event.name.startswith("Mem")
    ]
    return sum(kernels) / 1e3, len(kernels), peak


def main(args: list[str] | None = None) -> None:
    """Prints the tables, and writes them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.5b", choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["lora", "miss"])
    parser.add_argument("--ctx_len", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(args)
    torch.set_float32_matmul_precision("high")
    times = [
        f"{device_name()}, torch {torch.__version__}, model {options.size}",
        "",
        "| method | rows × ctx_len | grad_cp | peft ms | peft bf16 ms | fused ms | floor ms | "
        "peft / fused | peft bf16 / fused |",
        "|---|---|---|" + "---|" * 6,
    ]
    works = [
        "",
        "| method | rows × ctx_len | grad_cp | kind | device ms | launches | peak GiB |",
        "|---|---|---|---|" + "---|" * 3,
    ]
    for method in options.methods:
        for ctx_len in options.ctx_len:
            for grad_cp in (False, True):
                setting = Setting(options.size, method, options.rows, ctx_len, grad_cp)
                new = rows_of(setting, options.rounds)
                print(*new, sep="\n", flush=True)
                times.append(new[0])
                works += new[1:]
    report(times + works, options.output)


def rows_of(setting: Setting, rounds: int) -> list[str]:
    """A row of the table of times, and those of the table of work."""
    try:
        times = times_of(setting, rounds)
    except ValueError as error:
        return [f"{setting} not timed: {error}" + " |" * 6]
    ratios = [f"{times.ratios[kind]:.2f}" for kind in CONTROLS]
    row = [*(f"{x:.1f}" for x in times.milliseconds), *ratios]
    rows = [f"{setting} {' | '.join(row)} |"]
    for kind in KINDS:
        milliseconds, launches, peak = work_of(setting, kind)
        rows.append(f"{setting} {kind} | {milliseconds:.1f} | {launches:.0f} | {peak:.3f} |")
    return rows


if __name__ == "__main__":
    main()
