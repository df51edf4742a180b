"""Time, memory and error of every backend of the recurrences, on the same inputs in one run.

    python benchmarks/ops.py [--ops wkv7 wkv6] [--backends torch fla] [--shapes 1,4096,32 8,1024,32]
        [--dtype bf16] [--packed] [--fla_configs 4] [--output FILE]

Each backend is first held against the float64 recurrence at the batch and heads of every shape,
over 192 tokens with a state given: one that leaves the error budget (ops/budget.py) is not
timed. On a GPU, times are the device's alone: medians between events, the L2 cache flushed before
forward and before backward, the queue filled while the device sleeps, so that no launch is waited
for. Memory is that of allocated tensors: kept from forward to backward beside inputs, output and
last state; and at its peak, beside these and the gradients. The host's time is that of a call of
the operator and of its backward pass until all is queued, checks of the arguments included, at a
shape so small that the device is done first: of one call with a backward pass of its own, which
autograd hands to another thread, and of a call in a row of several, each reading what the one
before gave, with one backward pass through all, as the layers of a model have it. Beside it is the
time of an autograd function that makes results and gradients and fills none: what PyTorch, and the
checks, take of every operator. Backends of other programs are measured where they can be imported.
fla tries the settings of its kernels at their first call, which is not timed but takes minutes
unless --fla_configs says how many of them to try.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from peers import PEERS, Kernel
from report import report
from torch import Tensor

from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import Case, make_segment_ids, run
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.fla import cap_autotuning

Forward = Callable[[], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor], Sequence[Tensor]]
Expected = tuple[Case, dict[str, Tensor], dict[str, Tensor]]

SHAPES = (
    (1, 512, 12),
    (1, 1024, 32),
    (1, 4096, 32),
    (8, 1024, 32),
    (8, 4096, 32),
    (1, 16384, 32),
    (1, 65536, 32),
    (8, 4096, 64),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_TOKENS = 192
SECONDS = 0.3  # spent on the rounds of one measurement
FLUSHED_BYTES = 256 * 2**20
HOST_SHAPE = (1, 128, 2)  # at which the device is done before the host
HOST_CALLS = (1, 8)  # calls with one backward pass
CYCLES = 2e9  # of a GPU in a second, or a little more


class Figures(NamedTuple):
    """Of one backend at one shape: milliseconds, without backward if it has none, and, on a GPU,
    MiB."""

    forward: float
    backward: float | None
    kept: float | None = None
    peak: float | None = None


@functools.lru_cache(maxsize=1)
def expected(
    op: str, B: int, T: int, H: int, dtype: torch.dtype, packed: bool, device: torch.device
) -> Expected:
    """A case, its exact results, and those of the same maths in its dtype."""
    operator = OPERATORS[op]
    case = operator.make_case(B=B, T=T, H=H, packed=packed).to(dtype, device)
    runs = run(case.to(torch.float64, device), operator.reference), run(case, operator.baseline)
    exact, baseline = ({name: x.detach() for name, x in results.items()} for results in runs)
    return case, exact, baseline


def check(kernel: Kernel, given: Expected) -> dict[str, float]:
    """Relative error of each result; AssertionError if one is over the budget."""
    case, exact, baseline = given
    found = results(case, kernel)
    for name, x in found.items():
        assert_within_budget(x, exact[name], baseline[name], name)
    return {n: ((x - exact[n]).norm() / exact[n].norm()).item() for n, x in found.items()}


def results(case: Case, kernel: Kernel) -> dict[str, Tensor]:
    """Both results and, of a kernel that has a backward pass, the gradients."""
    inputs = [x.detach().requires_grad_() for x in case.inputs.values()]
    y, last = kernel(*inputs, case.initial_state, case.segment_ids)
    return run(case, kernel) if y.requires_grad else {"y": y, "state": last}


def timed_case(
    op: str, shape: tuple[int, int, int], dtype: torch.dtype, packed: bool, device: torch.device
) -> Case:
    """Inputs of a shape: a short row again and again, since drawing them all would take longest."""
    B, T, H = shape
    case = OPERATORS[op].make_case(B=1, T=min(T, 512), H=H, has_state=False).to(dtype, device)

    def tile(x: Tensor) -> Tensor:
        return x.repeat(B, -(-T // 512), 1, 1)[:, :T].contiguous()

    inputs = {name: x if name == "u" else tile(x) for name, x in case.inputs.items()}
    segments = make_segment_ids(B, T).to(device) if packed else None
    return Case(inputs, None, tile(case.dy), case.dstate, segments)


def measure(kernel: Kernel, case: Case, device: torch.device) -> Figures:
    """Times and memory of a forward and its backward, as in training: no state is given."""
    inputs = [x.detach().requires_grad_() for x in case.inputs.values()]

    def forward() -> tuple[Tensor, Tensor]:
        return kernel(*inputs, None, case.segment_ids)

    def backward(y: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(y, inputs, case.dy) if y.requires_grad else ()

    has_backward = bool(backward(forward()[0]))
    if device.type == "cpu":
        figures = _measure_cpu(forward, backward)
    else:
        kept, peak = _memory(forward, backward)
        figures = Figures(*_device_times(forward, backward), kept, peak)
    return figures if has_backward else figures._replace(backward=None)


def _measure_cpu(forward: Forward, backward: Backward) -> Figures:
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < SECONDS:
        started = time.perf_counter()
        y, _ = forward()
        middle = time.perf_counter()
        backward(y)
        times.append((middle - started, time.perf_counter() - middle))
    return Figures(*(statistics.median(column) * 1e3 for column in zip(*times, strict=True)))


def _memory(forward: Forward, backward: Backward) -> tuple[float, float]:
    """MiB kept for backward and at the peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, state = forward()
    results = y.nbytes + state.nbytes
    kept = torch.cuda.memory_allocated() - before - results
    results += sum(x.nbytes for x in backward(y))
    peak = torch.cuda.max_memory_allocated() - before - results
    return kept / 2**20, peak / 2**20


def _device_times(forward: Forward, backward: Backward) -> tuple[float, float]:
    """Median ms of the device in forward and in backward."""
    host = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        backward(forward()[0])
        host.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    queueing = statistics.median(host)
    ballast = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(max(3, min(30, int(SECONDS / (whole + queueing))))):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda._sleep(int(1.5 * queueing * CYCLES))
        ballast.zero_()
        events[0].record()
        y, _ = forward()
        events[1].record()
        ballast.zero_()
        events[2].record()
        backward(y)
        events[3].record()
        torch.cuda.synchronize()
        times.append((events[0].elapsed_time(events[1]), events[2].elapsed_time(events[3])))
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second


def host_time(
    op: str, kernel: Kernel, dtype: torch.dtype, device: torch.device, calls: int
) -> float:
    """Median µs that a call and its backward pass take to queue, of `calls` in a row."""
    case = timed_case(op, HOST_SHAPE, dtype, False, device)
    first, *others = case.inputs.values()
    layers = [[x.clone().requires_grad_() for x in others] for _ in range(calls)]
    first = first.clone().requires_grad_()
    given = [first, *(x for layer in layers for x in layer)]

    def step() -> None:
        y = first
        for layer in layers:
            y, _ = OPERATORS[op].function(y, *layer, kernel=kernel)
        torch.autograd.grad(y, given, case.dy)

    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 20 or time.perf_counter() - begin < SECONDS:
        if device.type != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times) / calls * 1e6


class _Nothing(torch.autograd.Function):
    """Of an operator no more than its tensors."""

    @staticmethod
    def forward(ctx, r, *others):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(r, *others)
        ctx.set_materialize_grads(False)
        B, _, H, N = r.shape
        return torch.empty_like(r), r.new_empty((B, H, N, N), dtype=torch.float32)

    @staticmethod
    def backward(ctx, dy, dlast_state):  # type: ignore[no-untyped-def]
        return tuple(None if x is None else torch.empty_like(x) for x in ctx.saved_tensors)


def host_table(op: str, kernels: dict[str, Kernel], dtype: torch.dtype) -> list[str]:
    """The lines of the host's times."""
    counts = [f"{n} in a row" if n > 1 else "one alone" for n in HOST_CALLS]
    head = f"| {op}: host µs a call | {' | '.join(counts)} |"
    lines = ["", head, "|---|" + "---|" * len(counts)]
    for name, kernel in {**kernels, "(nothing)": _Nothing.apply}.items():
        found = (host_time(op, kernel, dtype, torch.device("cuda"), n) for n in HOST_CALLS)
        lines.append(f"| {name} | " + " | ".join(f"{x:.0f}" for x in found) + " |")
    return lines


def cells(figures: Figures, tokens: int) -> str:
    """The figures of a row, and its tokens a second."""
    times = ("–" if x is None else f"{x:.3f}" for x in figures[:2])
    memory = ("–" if x is None else f"{x:.2f}" for x in figures[2:])
    rate = tokens / (figures.forward + (figures.backward or 0)) * 1e3
    return f"{' | '.join(times)} | {rate:.3g} | {' | '.join(memory)} |"


def tables(op: str, options: argparse.Namespace, device: torch.device) -> list[str]:
    """The lines of an operator: figures of each shape and backend, then the errors."""
    dtype, worst = DTYPES[options.dtype], {}
    request = Request(device, dtype, 64)
    backends = [*OPERATORS[op].table, *(() if options.packed else PEERS[op])]
    asked = options.backends
    backends = [b for b in backends if (b.name in asked if asked else b.name != "reference")]
    why = {b.name: b.objection(request) for b in backends}
    kernels = {b.name: b.load() for b in backends if why[b.name] is None}
    head = "forward ms | backward ms | tokens/s | kept MiB | peak MiB"
    lines = [f"| {op}: B, T, H | backend | {head} |", "|---|---|" + "---|" * 5]
    for shape in options.shapes:
        B, T, H = shape
        size = (B, min(T, CHECKED_TOKENS), H)
        given = expected(op, *size, dtype, options.packed, device)
        for name, kernel in kernels.items():
            start = f"| {B}, {T}, {H} | {name} | "
            try:
                errors = check(kernel, given)
                case = timed_case(op, shape, dtype, options.packed, device)
                lines.append(start + cells(measure(kernel, case, device), B * T))
                old = worst.setdefault(name, dict.fromkeys(errors, 0.0))
                worst[name] = {key: max(x, old[key]) for key, x in errors.items()}
            except AssertionError as error:
                lines.append(start + f"not timed: {error} |" + " |" * 4)
            except torch.OutOfMemoryError:
                lines.append(start + "out of memory |" + " |" * 4)
            print(lines[-1], flush=True)
    names = max(map(list, worst.values()), key=len, default=[])
    lines += ["", f"| {op}: error ×1e-3 | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for name, errors in worst.items():
        row = (f"{errors[n] * 1e3:.3g}" if n in errors else "–" for n in names)
        lines.append(f"| {name} | {' | '.join(row)} |")
    if device.type != "cpu":
        whole = [name for name, errors in worst.items() if len(errors) == len(names)]
        lines += host_table(op, {name: kernels[name] for name in whole}, dtype)
    return [*lines, "", *(f"Not run: {name} {text}." for name, text in why.items() if text), ""]


def _shape(text: str) -> tuple[int, int, int]:
    B, T, H = map(int, text.split(","))
    return B, T, H


def setting(options: argparse.Namespace, device: torch.device) -> str:
    """One line: what was measured, on what, with what."""
    found = [f"torch {torch.__version__}"]
    for package in ("triton", "fla-core", "flashrwkv2"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else platform.processor() or platform.machine()
    rows = "packed rows" if options.packed else "rows of one document"
    tuned = f"{options.fla_configs} settings" if options.fla_configs else "all its settings"
    return (
        f"{name}, {', '.join(found)}, {options.dtype}, {rows}, head size 64; fla tuned over {tuned}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes them to a file if asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--backends", nargs="+", help="all but 'reference' if not given")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="B,T,H")
    default = "bf16" if device.type == "cuda" else "fp32"
    parser.add_argument("--dtype", default=default, choices=list(DTYPES))
    parser.add_argument("--packed", action="store_true", help="rows of several documents")
    parser.add_argument("--fla_configs", type=int, metavar="N", help="settings that fla tries")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.fla_configs:
        cap_autotuning(options.fla_configs)
    lines = [setting(options, device), ""]
    for op in options.ops:
        lines += tables(op, options, device)
    report(lines, options.output)


if __name__ == "__main__":
    main()
