"""The kernels of a compiled and captured training step on a GPU, by kind and by name.

    python benchmarks/step_kernels.py [--sizes 0.1b 1.5b] [--shapes 1024x1 4096x1] [--method lora]

The steps are those of `step.py`, whose gradients are compared with those of a plain step first:
where they differ by more than it allows nothing is printed but that. Times of kernels are of one
step among three that the profiler records; the gaps between them are those of the device.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_step import SIZES, device_name
from report import report_as_found
from step import LARGEST_ERROR, Case, clean, milliseconds
from torch.profiler import ProfilerActivity, profile

from rwkv_peft.device import own_stream

KINDS = {
    "products": ("nvjet", "gemm", "cutlass", "splitKreduce"),
    "loss": ("softmax", "arange_div_eq"),
    "compiled elementwise": ("triton_",),
    "recurrence": ("wkv7", "scan"),
    "copies": ("memcpy", "Memcpy"),
}
ROUNDS = 3


def kind_of(name: str) -> str:
    """The first kind of which a kernel's name has a part."""
    return next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "others")


def kernels(case: Case) -> list[tuple[float, float, str]]:
    """Begin, end in microseconds and name of the kernels of one step, in their order."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            case.take()
        torch.cuda.synchronize()
    ours = (x for x in found.events() if x.device_type == torch.autograd.DeviceType.CUDA)
    events = sorted((x.time_range.start, x.time_range.end, x.name) for x in ours)
    count = len(events) // ROUNDS
    return events[count : 2 * count]


def rows_of(title: str, names: list[tuple[str, float]], least: float) -> Iterator[str]:
    """A line for each name with the number of its kernels and their time, the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, us in names:
        times[name].append(us)
    yield f"| {title} | kernels | ms | µs each |"
    yield "|---|---|---|---|"
    for name, each in sorted(times.items(), key=lambda x: -sum(x[1])):
        if sum(each) >= least:
            mean = sum(each) / len(each)
            yield f"| {name[:120]} | {len(each)} | {sum(each) / 1e3:.2f} | {mean:.1f} |"
    yield ""


def measure(size: str, shape: str, method: str) -> Iterator[str]:
    """The lines of one step."""
    ctx, rows = map(int, shape.split("x"))
    clean()
    case = Case(size, ctx, rows, method, "plain", 0)
    _, expected = case.gradients()
    del case
    clean()
    case = Case(size, ctx, rows, method, "compiled, graphed", 0)
    _, found = case.gradients()
    error = ((found - expected).norm() / expected.norm()).item()
    yield f"## {size}, {ctx} × {rows}, {method}: gradients differ by {error:.1e}"
    yield ""
    if error > LARGEST_ERROR:
        return
    step, backward = milliseconds(case.take), milliseconds(case.backward)
    case.optimizer.clip()
    case.optimizer.step(lr=0.0)
    events = kernels(case)
    times = [(name, end - begin) for begin, end, name in events]
    gaps = sum(max(0, later[0] - sooner[1]) for sooner, later in itertools.pairwise(events))
    yield (
        f"A step {step:.2f} ms, forward and backward {backward:.2f} ms; {len(events)} kernels, "
        f"together {sum(us for _, us in times) / 1e3:.2f} ms, between them {gaps / 1e3:.2f} ms."
    )
    yield ""
    yield from rows_of("kind", [(kind_of(name), us) for name, us in times], 0)
    yield from rows_of("name", [(name.replace("|", " "), us) for name, us in times], 20)


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=["1.5b"], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=["1024x1", "4096x1"])
    parser.add_argument("--method", default="lora", choices=["lora", "miss", "state", "full"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    head = [f"{device_name()}, PyTorch {torch.__version__}; kernels of an optimizer step, bf16", ""]
    cases = itertools.product(options.sizes, options.shapes)
    rows = (row for case in cases for row in measure(*case, options.method))
    with own_stream(torch.device("cuda")):
        report_as_found(head, rows, options.output)


if __name__ == "__main__":
    main()
