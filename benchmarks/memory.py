"""Memory of tuning on a GPU.

    python benchmarks/memory.py [--sizes 1.5b] [--methods lora] [--quants none nf4] [--small]
        [--grad_cp 2] [--optimizer_cpu]

Random weights of the released shapes, ctx 1024, one row, rank 64 on the six projections, blocks
recomputed, compiled and captured, six optimizer steps: each case in a process of its own. Allocated
is the allocator's peak from the first step on, reserved what it holds at the end, the pools of
graphs too; process is what the driver counts for the whole process, as nvidia-smi shows it, context
and libraries too. `--small` also leaves the embedding on the host, keeps moments in 8 bits, and
stores the head as the projections; `--grad_cp 2` also has the inputs of blocks wait on the host,
and `--optimizer_cpu` what the optimizer remembers.
Predicted is what a run says before it begins. The losses of a case that are not finite refuse it.
Several cases run at a time (--jobs); then the driver's count is of each process where it tells
that, and else left out.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_step import SIZES, config_of, device_name
from report import report_as_found

from rwkv_peft.models import build
from rwkv_peft.quant import STORAGES, stored_layers
from rwkv_peft.training.memory import bytes_of_training, guess_bytes

GIB = 2**30
METHODS = ("state", "lora", "miss", "pissa")
CTX, STEPS = 1024, 6


def measure(
    size: str, method: str, quant: str, *, is_small: bool, grad_cp: int, on_host: bool, way: str
) -> dict[str, Any]:
    """What one case takes, in GiB, in this process."""
    from step import Case

    from rwkv_peft.device import own_stream, use_expandable_segments

    use_expandable_segments()
    with own_stream(torch.device("cuda")):
        case = Case(size, CTX, 1, method, way, grad_cp, quant, is_small=is_small, on_host=on_host)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses = []
        for _ in range(STEPS):
            losses.append(case.backward().item())
            case.optimizer.clip()
            case.optimizer.step(lr=1e-5)
        torch.cuda.synchronize()
    if not all(torch.tensor(losses).isfinite()):
        raise ArithmeticError(f"the loss is {losses}")
    return {
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.memory_reserved() / GIB,
        "process": of_process(),
        "loss": losses[0],
    }


def predict(
    size: str,
    method: str,
    quant: str,
    *,
    is_small: bool,
    grad_cp: int = 1,
    on_host: bool = False,
    positions: int = CTX,
) -> float:
    """GiB that a run over so many positions at once would say it takes, by the shapes alone."""
    from step import RANK

    model_config = config_of(size)
    shapes = build(model_config, op="reference")
    num_weights = sum(x.numel() for x in shapes.parameters())
    layers = [x for name, x in stored_layers(shapes) if name.startswith("blocks.")]
    sides = [x.in_features * (method != "miss") + x.out_features for x in layers]
    # a state is in float32
    states = model_config.n_layer * model_config.n_embd * model_config.head_size
    of_method = {"state": (states, 4), "full": (num_weights, 2)}
    trained, width = of_method.get(method, (RANK * sum(sides), 2))
    optimizer = "adamw8bit" if is_small and method != "state" else "adamw"
    each = bytes_of_training(width, optimizer, has_one_backward=True, on_host=on_host)
    # those of the model are there already
    each += width if method != "full" else 0
    guess = guess_bytes(
        model_config,
        torch.bfloat16,
        "cuda",
        positions,
        num_weights,
        trained * each,
        grad_cp=grad_cp,
        quant=quant,
        has_head=is_small,
        emb_cpu=is_small,
    )
    return guess / GIB


def of_process() -> float | None:
    """GiB that the driver counts for this process; None if it does not tell."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    found = [row.split(",") for row in rows if "," in row]
    own = [float(used) for pid, used in found if int(pid) == os.getpid()]
    # in a container the driver does not know our number
    if not own and len(found) == 1:
        own = [float(found[0][1])]
    if not own and os.environ.get("IS_ALONE"):
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB
    return own[0] / 1024 if own else None


def run_case(case: tuple[str, str, str], options: argparse.Namespace) -> str:
    """A table row, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", *case, "--way", options.way]
    command += ["--grad_cp", str(options.grad_cp), *["--small"] * options.small]
    command += ["--optimizer_cpu"] * options.optimizer_cpu
    alone = {"IS_ALONE": "1"} if options.jobs == 1 else {}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **alone}, timeout=400
    )
    how = ", small" * options.small + f", grad_cp {options.grad_cp}" * (options.grad_cp > 1)
    how += ", optimizer_cpu" * options.optimizer_cpu
    start = f"| {' | '.join(case)}{how} | "
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return start + f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:160]} | | | | |"
    found = json.loads(lines[-1])
    said = predict(
        *case, is_small=options.small, grad_cp=options.grad_cp, on_host=options.optimizer_cpu
    )
    process = "–" if found["process"] is None else f"{found['process']:.2f}"
    return (
        start + f"{found['allocated']:.2f} | {found['reserved']:.2f} | {process} | "
        f"{said:.2f} | {found['loss']:.3f} |"
    )


def main() -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[1:], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quants", nargs="+", default=["none", "int8", "nf4"],
                        choices=["none", *STORAGES])  # fmt: skip
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--grad_cp", type=int, default=1, choices=[1, 2])
    parser.add_argument("--optimizer_cpu", action="store_true")
    parser.add_argument("--way", default="compiled, graphed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("SIZE", "METHOD", "QUANT"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.one:
        found = measure(
            *options.one,
            is_small=options.small,
            grad_cp=options.grad_cp,
            on_host=options.optimizer_cpu,
            way=options.way,
        )
        print(json.dumps(found))
        return
    head = [
        f"{device_name()}, PyTorch {torch.__version__}, bf16, ctx {CTX}, 1 row, rank 64; GiB",
        "",
        "| size | method | quant | allocated | reserved | process | predicted | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = list(itertools.product(options.sizes, options.methods, options.quants))
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = pool.map(lambda case: run_case(case, options), cases)
        report_as_found(head, rows, options.output)


if __name__ == "__main__":
    main()
