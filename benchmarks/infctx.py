"""Memory and time of rows in chunks on a GPU: truncated, exact, and against whole rows.

    python benchmarks/infctx.py [--size 1.5b] [--chunk_ctx 4096] [--output FILE.md]

Random bf16 weights of a released shape, random tokens, one row, LoRA of rank 32, whole optimizer
steps; with --cuda_graph 1 they are captured. First loss and gradient of a whole row and of exact
chunks are compared with those of a whole row in float64: nothing is measured if chunks are off by
more than twice as much as the whole row. Then: both ways at one length (--compared), blocks of the
whole row being recomputed; rows of rising --lengths, truncated and exact, whose peak should not
rise but by the states at the borders; one very long row (--long), exact. Times are of the last of
several steps. Peaks are of allocated tensors, and of reserved memory where steps are captured,
whose tensors nobody counts; the host's is of pinned memory. Results are written after each part, as
a table and, beside it, as FILE.json. On a CPU, where nobody counts memory, only time is measured.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_step import SIZES, device_name, make_model, make_optimizer, random_batch, synchronize
from gpu_step import timed_step as timed
from report import report

from rwkv_peft.data.batching import Batch
from rwkv_peft.device import free_host_memory, free_memory, own_stream
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.quant import STORAGES
from rwkv_peft.training.borders import BorderSizes
from rwkv_peft.training.chunk_graphs import GraphedChunks
from rwkv_peft.training.graphs import GraphedStep
from rwkv_peft.training.infctx import InfctxStep
from rwkv_peft.training.memory import room_for_borders
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.step import Step, forward_loss, full_step

GIB = 2**30
COLUMNS = {
    "way": "rows",
    "tokens": "tokens",
    "chunks": "chunks",
    "seconds": "s a step",
    "rate": "tokens/s",
    "peak": "peak GiB",
    "flat": "without borders",
    "device": "borders on the GPU, GiB",
    "host": "on the host, GiB",
    "pinned": "pinned, GiB",
    "loss": "loss",
}


class Bench:
    """A model with an adapter, and what was measured of it."""

    def __init__(
        self, size: str, op: str, chunk_ctx: int, *, is_captured: bool, quant: str = "none"
    ) -> None:
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.size, self.chunk_ctx, self.vocab_size = size, chunk_ctx, SIZES[size][-1]
        self.room = room_for_borders(self.device, free_memory(self.device), free_host_memory())
        self.model: RWKV = make_model(size, op, self.device, quant)
        self.optimizer: Optimizer = make_optimizer(self.model, "lora")
        if is_captured:
            self.optimizer.keep_gradients()
        self.chunks = GraphedChunks(self.device, chunk_ctx) if is_captured else None
        self.found: list[dict[str, Any]] = []

    def step(self, way: str, tokens: int) -> Step:
        """Whole rows with recompute, or chunks without, as they are or captured."""
        self.model.grad_cp = way == "whole, recomputed"
        if self.model.grad_cp:
            return GraphedStep(self.device, tokens) if self.chunks else full_step
        group = 1 if way == "truncated" else None
        return InfctxStep(self.chunk_ctx, group, room=self.room, way=self.chunks)

    def check(self, tokens: int) -> dict[str, float]:
        """Errors of loss and gradient of a whole row and of exact chunks, as parts.

        Raises:
            SystemExit: those of chunks are too large for anything to be measured.
        """
        # a fresh adapter gives its first matrix no gradient
        torch.manual_seed(1)
        noise = {n: 0.01 * torch.randn(x.shape) for n, x in self.optimizer.values.items()}
        self.optimizer.load({n: x for n, x in noise.items() if "lora_B" in n})
        batch = random_batch(1, tokens, self.vocab_size)
        loss, gradient = self.exact(batch)
        errors = {}
        ways = {"whole": full_step, "chunks": InfctxStep(tokens // 4, None)}
        if self.chunks:
            captured = GraphedChunks(self.device, tokens // 8)
            ways["chunks"] = InfctxStep(tokens // 8, None, way=captured)
        for way, step in ways.items():
            output = step(
                self.model,
                batch,
                state=None,
                divisor=tokens,
                l2wrap=1e-4,
                backward=self.optimizer.backward,
            )
            found = self.optimizer.gradients
            off = [(x - gradient[n].to(x)).norm() for n, x in found.items() if x is not None]
            size = torch.stack([x.norm() for x in gradient.values()]).norm()
            errors[f"loss, {way}"] = abs(float(output.loss_sum) / loss - 1)
            errors[f"gradient, {way}"] = float(torch.stack(off).norm() / size)
            self.optimizer.clip()
            self.optimizer.step(lr=0.0)
        eps = torch.finfo(self.model.emb.weight.dtype).eps
        for what in ("loss", "gradient"):
            if errors[f"{what}, chunks"] > 2 * (errors[f"{what}, whole"] + eps):
                raise SystemExit(f"not measured, as the {what} of chunks is wrong: {errors}")
        return errors

    def exact(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradient of a whole row in float64, by the plain operator."""
        config, own = self.model.model_config, dict(self.model.named_parameters())
        for name, layer in self.model.named_modules():
            if isinstance(layer, FrozenLinear):
                own[f"{name}.weight"] = layer.dense()
        model = build(config, op="torch", device=self.device, dtype=torch.float64)
        model.to_empty(device=self.device).to(torch.float64)
        trained = make_optimizer(model, "lora", dtype=torch.float64).values
        model.grad_cp = True
        with torch.no_grad():
            for name, x in model.named_parameters():
                x.copy_(own[name])
        sums, _ = forward_loss(model, batch, l2wrap=1e-4)
        (sums.objective / batch.num_trained).backward()
        gradient = {n: x.grad.float() for n, x in trained.items() if x.grad is not None}
        return float(sums.cross_entropy), gradient

    def measure(self, way: str, tokens: int, steps: int = 1) -> dict[str, Any]:
        """Seconds of the last of some steps, and peaks of memory over all."""
        step, has_peak = self.step(way, tokens), self.device.type == "cuda"
        if has_peak:
            # graphs of the last way lie in circles of objects
            gc.collect()
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()
            torch.cuda.reset_peak_host_memory_stats()
        batch = random_batch(1, tokens, self.vocab_size)
        for _ in range(steps):
            loss, seconds = timed(self.model, self.optimizer, batch, step)
        chunks = 1 if way == "whole, recomputed" else -(-tokens // self.chunk_ctx)
        borders = chunks - 1 if way == "exact" else 0
        config, dtype = self.model.model_config, self.model.emb.weight.dtype
        on_device, on_host = BorderSizes(config, 1, dtype, self.device).take(borders, self.room)
        peak = self.peak() / GIB if has_peak else 0.0
        pinned = host_peak() / GIB if has_peak else 0.0
        row = {
            "way": way,
            "tokens": tokens,
            "chunks": chunks,
            "seconds": seconds,
            "rate": tokens / seconds,
            "peak": peak,
            "flat": peak - on_device / GIB,
            "device": on_device / GIB,
            "host": on_host / GIB,
            "pinned": pinned,
            "loss": loss,
        }
        self.found.append(row)
        print(line(row), flush=True)
        return row

    def peak(self) -> int:
        """Most bytes on the device: of tensors, or with those of graphs all that is reserved."""
        if self.chunks:
            return int(torch.accelerator.max_memory_reserved())
        return int(torch.accelerator.max_memory_allocated())


def host_peak() -> int:
    """Most bytes of pinned memory on the host since its peak was reset."""
    return int(torch.cuda.host_memory_stats().get("active_bytes.peak", 0))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    texts = (f"{x:,.4g}" if isinstance(x, float) else f"{x:,}" for x in list(row.values())[1:])
    return f"| {row['way']} | {' | '.join(texts)} |"


def warm(tokens: int, options: argparse.Namespace) -> int:
    """Steps until one can be timed; a long row is itself many chunks."""
    steps = 2 if tokens > 100_000 else 3
    return steps + 2 if options.cuda_graph and tokens <= 100_000 else steps


def parts(bench: Bench, options: argparse.Namespace) -> Iterator[str]:
    """Measures part after part, and says what each shows."""
    # what is laid out at first calls, or captured, is not timed
    exact, whole = (
        bench.measure(way, options.compared, warm(options.compared, options))
        for way in ("exact", "whole, recomputed")
    )
    yield (
        f"Exact chunks take {exact['seconds'] / whole['seconds']:.3f} times as long as a whole row "
        f"of {options.compared:,} tokens whose blocks are recomputed."
    )
    for way in ("truncated", "exact"):
        rows = [bench.measure(way, n, warm(n, options)) for n in options.lengths]
        # a single chunk goes forward once, and a step's own work weighs in it
        longer = rows[1:] if len(rows) > 2 else rows
        peaks, times = [r["flat"] for r in rows], [r["seconds"] / r["tokens"] for r in longer]
        if min(peaks) > 0:
            yield (
                f"{way}: from {options.lengths[0]:,} to {options.lengths[-1]:,} tokens the peak "
                f"without borders varies by {100 * (max(peaks) / min(peaks) - 1):.2f} %, from "
                f"{longer[0]['tokens']:,} on the time of a token by "
                f"{100 * (max(times) / min(times) - 1):.1f} %."
            )
    if options.long:
        bench.measure("exact", options.long, options.long_steps)
        yield f"The last row: {options.long_steps} steps, the time is of the last."


def main() -> None:
    """Reads what to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.5b", choices=list(SIZES))
    parser.add_argument("--quant", default="none", choices=["none", *STORAGES])
    parser.add_argument("--op", default="auto")
    parser.add_argument("--chunk_ctx", type=int, default=4096)
    parser.add_argument("--compared", type=int, default=32768)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 262144])
    parser.add_argument("--long", type=int, default=1048576, help="0: no such row")
    parser.add_argument("--long_steps", type=int, default=2)
    parser.add_argument("--cuda_graph", type=int, choices=[0, 1], default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    # where graphs can be captured
    with own_stream(torch.accelerator.current_accelerator() or torch.device("cpu")):
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Prints the table of all parts, and writes it to files if asked."""
    bench = Bench(
        options.size,
        options.op,
        options.chunk_ctx,
        is_captured=bool(options.cuda_graph),
        quant=options.quant,
    )
    errors = bench.check(min(options.chunk_ctx, 1024))
    head = [
        f"{device_name()}, torch {torch.__version__}, {options.size}, "
        + f"weights in {options.quant}, " * (options.quant != "none")
        + f"op {bench.model.op.name}, "
        f"LoRA of rank 32, chunks of {options.chunk_ctx:,} tokens, "
        + ("captured as CUDA graphs" if options.cuda_graph else "not captured"),
        "",
        "Errors against float64: " + ", ".join(f"{n} {x:.1e}" for n, x in errors.items()) + ".",
    ]
    said: list[str] = []
    table = [f"| {' | '.join(COLUMNS.values())} |", "|" + "---|" * len(COLUMNS)]
    synchronize()
    for sentence in parts(bench, options):
        said.append(sentence)
        lines = [*head, *said, "", *table, *map(line, bench.found)]
        if options.output:
            report(lines, options.output)
            found = {"errors": errors, "said": said, "rows": bench.found}
            options.output.with_suffix(".json").write_text(json.dumps(found, indent=1))
    report(lines, None)


if __name__ == "__main__":
    main()
