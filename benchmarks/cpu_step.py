"""Time of the recurrences and of a LoRA training step on a CPU, backends side by side.

    python benchmarks/cpu_step.py [--output FILE] [--threads 2]

The backends take turns in one process, so that a machine whose speed drifts is the same for all;
the table shows medians and, beside them, minima. A figure is printed only if the numerical check of
the same run passed: every result and gradient of the operator within the error budget, the loss of
a step equal over backends to 1e-5.
"""

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_step import make_optimizer, random_batch, timed_step
from report import report

from rwkv_peft.checkpoint.pth import load_weights
from rwkv_peft.data.batching import Batch
from rwkv_peft.models import build
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.initial import default_ranks, initial_weights
from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import make_wkv6_case, make_wkv7_case, run
from rwkv_peft.ops.wkv6.chunked import wkv6_chunked
from rwkv_peft.ops.wkv6.reference import wkv6_baseline, wkv6_reference
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_baseline, wkv7_reference

# the loop as the rwkv package writes it, our own, and the chunked form
FORMS = ("package", "reference", "torch")
OPERATORS = {
    "wkv7": (make_wkv7_case, (wkv7_baseline, wkv7_reference, wkv7_chunked)),
    "wkv6": (make_wkv6_case, (wkv6_baseline, wkv6_reference, wkv6_chunked)),
}
SHAPES = ((1, 512, 2), (1, 512, 4), (1, 512, 12), (4, 512, 4), (1, 2048, 4))
# name, layers, width, vocabulary, rows, tokens a row
MODELS = (("bundled base", 6, 256, 5120, 8, 96), ("0.1b", 12, 768, 65536, 1, 512))


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, the runs taking turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def operator_rows(rounds: int) -> list[str]:
    """A table row an operator and shape: forward and backward of each backend, and the ratios."""
    rows = []
    for operator, (make_case, forms) in OPERATORS.items():
        functions = dict(zip(FORMS, forms, strict=True))
        for B, T, H in SHAPES:
            case = make_case(B=B, T=T, H=H)
            exact = run(case.to(torch.float64), functions["reference"])
            baseline = run(case, functions["package"])
            for name, value in run(case, functions["torch"]).items():
                assert_within_budget(value, exact[name], baseline[name], name)
            calls = {name: partial(run, case, f) for name, f in functions.items()}
            seconds = take_turns(calls, rounds)
            cells = [
                f"{statistics.median(x) * 1e3:.1f} ({min(x) * 1e3:.1f})" for x in seconds.values()
            ]
            for name in ("package", "reference"):
                pairs = zip(seconds[name], seconds["torch"], strict=True)
                cells.append(f"{statistics.median(a / b for a, b in pairs):.1f}×")
            rows.append(f"| {operator} {B}, {T}, {H} | " + " | ".join(cells) + " |")
    return rows


def make_step(model_config: ModelConfig, op: str, batch: Batch) -> Callable[[], float]:
    """A LoRA step (rank 32) of a fresh model, and its loss."""
    model = build(model_config, op=op)
    load_weights(model, initial_weights(model_config, seed=0))
    optimizer = make_optimizer(model, "lora")
    return lambda: timed_step(model, optimizer, batch)[0]


def step_rows(rounds: int) -> list[str]:
    """A table row a model: a whole step with each backend."""
    rows = []
    for name, n_layer, n_embd, vocab_size, num_rows, T in MODELS:
        model_config = ModelConfig(
            "x070", n_layer, n_embd, n_embd, 4 * n_embd, 64, vocab_size, default_ranks(n_embd)
        )
        batch = random_batch(num_rows, T, vocab_size)
        steps = {op: make_step(model_config, op, batch) for op in ("reference", "torch")}
        losses = [step() for step in steps.values()]
        assert abs(losses[0] - losses[1]) < 1e-5 * losses[0], losses
        seconds = take_turns(dict(steps), rounds)
        loop, torch_ = (statistics.median(seconds[op]) for op in ("reference", "torch"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(
            f"| {name} | {num_rows} × {T} | {loop:.2f} | {torch_:.2f} | "
            f"{num_rows * T / torch_:.0f} | {peak:.2f} |"
        )
    return rows


def main() -> None:
    """Prints the tables, and writes them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, float32",
        "",
        "Operator, forward + backward, ms, median (minimum). The token loop as the rwkv package",
        "writes it (under autograd), our own token loop (`op=reference`), the chunked form",
        "(`op=torch`), and how many times faster it is than each, pair by pair:",
        "",
        "| operator B, T, H | package | reference | torch | package : torch | reference : torch |",
        "|---|---|---|---|---|---|",
        *operator_rows(options.rounds),
        "",
        "LoRA step, rank 32 (forward, backward, clip, AdamW), seconds, median; memory is the "
        "process's peak, both models of a row loaded:",
        "",
        "| model | rows × tokens | reference | torch | tokens/s | peak GiB |",
        "|---|---|---|---|---|---|",
        *step_rows(max(3, options.rounds // 3)),
    ]
    report(lines, options.output)


if __name__ == "__main__":
    main()
