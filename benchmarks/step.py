"""Time of a training step on a GPU, beside the least that its matrix products take.

    python benchmarks/step.py [--sizes 0.1b 1.5b] [--shapes 1024x1 4096x1] [--methods lora miss]
        [--quants none int8 nf4]

Random bf16 weights of the released shapes, random tokens, all of them trained; LoRA and MiSS of
rank 64 on the six projections, state and full tuning. A step is forward, backward, clipping and
AdamW on float32 values, without the loop around it. It runs plainly, as a graph, compiled, and as
both; the gradients of each are compared with those of the plain one, and a way whose gradients
differ by more than bf16 explains is not timed. The floor is the time of the step's matrix products
alone, as one graph, in the same run; the share is that of the card's bf16 rate by these products.
With stored weights the gradients are compared with those of the plain step on the same weights.
Memory is what a run says it takes before it begins, the peak of allocated and the reserved memory,
in GiB. The way "fla" is a control: fla's model with peft's LoRA (`control.py`).
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_step import SIZES, device_name, make_model, optimizer_over, random_batch
from memory import predict
from report import report_as_found
from torch import Tensor

from rwkv_peft.device import leave_on_host, own_stream
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.models.offload import HostStore
from rwkv_peft.quant import STORAGES, stored_layers
from rwkv_peft.training.graphs import GraphedStep
from rwkv_peft.training.step import full_step

RANK = 64
TARGETS = ["receptance", "key", "value", "output"]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS},
    "miss": {"r": RANK, "target_modules": TARGETS},
    "pissa": {
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": TARGETS,
        "init_lora_weights": "pissa_niter_4",
    },
}
WAYS = {
    "plain": (False, False),
    "graphed": (False, True),
    "compiled": (True, False),
    "compiled, graphed": (True, True),
}
CONTROL = "fla"
# dense bf16 operations a second of an H100 or H200
RATE = 989e12
# relative, of gradients: at 0.1b those of either way are up to a tenth off float64, as are fp8's
LARGEST_ERROR = 0.2
ROUNDS = 12


class DenseWeights(Mapping[str, Tensor]):
    """The weights that stored layers stand for, in the place of those of a file."""

    def __init__(self, model: RWKV) -> None:
        self._layers = dict(stored_layers(model, has_head=True))

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name.removesuffix(".weight")].dense()

    def __iter__(self) -> Iterator[str]:
        return (f"{name}.weight" for name in self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Case:
    """A model, what is trained, and a step over one batch, done in one of `WAYS`."""

    def __init__(
        self,
        size: str,
        ctx: int,
        rows: int,
        method: str,
        way: str,
        grad_cp: int,
        quant: str = "none",
        *,
        is_small: bool = False,
        on_host: bool = False,
    ) -> None:
        self.device = torch.device("cuda")
        is_compiled, is_graphed = WAYS[way]
        model = make_model(size, "auto", self.device, quant, has_head=is_small)
        if is_small:
            table = model.emb.weight.data
            model.emb.weight = torch.nn.Parameter(leave_on_host(table, self.device), False)
        model.grad_cp = grad_cp > 0
        model.host = HostStore() if grad_cp == 2 else None
        torch.manual_seed(0)
        self.states = LearnedStates(model) if method == "state" else None
        trained: Any = self.states
        if trained is None:
            chosen: Any = {"full": "none", "pissa": "lora"}.get(method, method)
            trained = attach(model, chosen, OPTIONS.get(method, {}), weights=DenseWeights(model))
        generator = torch.Generator(self.device).manual_seed(1)
        for parameter in trained.values():
            if not parameter.any():
                parameter.data.normal_(0, 0.02, generator=generator)
        self.optimizer = optimizer_over(
            trained,
            is_full=method == "full",
            name="adamw8bit" if is_small else "adamw",
            accumulates=False,
            on_host=on_host,
        )
        self.model: RWKV = model.train()
        self.batch = random_batch(rows, ctx, SIZES[size][-1])
        if is_compiled:
            compile_blocks(model)
        self.step: Any = full_step
        if is_compiled or is_graphed:
            self.step = GraphedStep(self.device, ctx, is_captured=is_graphed)
            if self.states is None and is_graphed:
                self.optimizer.keep_gradients()

    def backward(self) -> Tensor:
        """Adds the gradients of the batch; gives its mean loss."""
        state = None if self.states is None else self.states.rows([""] * len(self.batch.tokens))
        output = self.step(
            self.model,
            self.batch,
            state=state,
            divisor=self.batch.weight,
            l2wrap=1e-4,
            backward=self.optimizer.backward,
        )
        return output.loss_sum / output.num_tokens

    def take(self, lr: float = 0.0) -> None:
        """One optimizer step."""
        self.backward()
        self.optimizer.clip()
        self.optimizer.step(lr=lr)

    def gradients(self) -> tuple[float, Tensor]:
        """Loss, and all gradients in one vector, after the step was captured."""
        for _ in range(3):
            loss = self.backward().item()
            found = [x for x in self.optimizer.gradients.values() if x is not None]
            vector = torch.cat([x.flatten().float() for x in found]).cpu()
            self.optimizer.clip()
            self.optimizer.step(lr=0.0)
        return loss, vector


def make_control(size: str, ours: Case) -> Any:
    """A case of another program with the values and the batch of ours."""
    from control import FlaCase

    return FlaCase(size, ours, RANK)


def milliseconds(function: Any, rounds: int = ROUNDS) -> float:
    """Median of the time between ends of calls that the host does not wait for."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(rounds):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / rounds * 1e3)
    return statistics.median(times)


def products(size: str, tokens: int, method: str) -> Iterator[tuple[int, int, int]]:
    """(M, K, N) of each matrix product (M, K) x (K, N) of a step."""
    layers, D, ranks, vocab = SIZES[size]
    projections = [(D, D)] * 4 + [(D, 4 * D), (4 * D, D)]
    low_rank = [(D, r) for r in ranks] + [(r, D) for r in ranks]
    for _ in range(layers):
        for K, N in [*projections, *low_rank]:
            yield tokens, K, N
            yield tokens, N, K
            if method == "full":
                yield K, tokens, N
        if method in ("lora", "miss"):
            for K, N in projections:
                yield tokens, K, RANK
                yield tokens, RANK, N
                yield tokens, N, RANK
                yield tokens, RANK, K
                yield N, tokens, RANK
                if method == "lora":
                    yield RANK, tokens, K
    yield tokens, D, vocab
    yield tokens, vocab, D
    if method == "full":
        yield vocab, tokens, D


def floor(size: str, tokens: int, method: str) -> tuple[float, float]:
    """Milliseconds of the products alone as one graph, and their operations."""
    sizes = list(products(size, tokens, method))
    largest = max(max(m * k, k * n) for m, k, n in sizes)
    store = torch.randn(2 * largest, device="cuda").bfloat16()
    out = torch.empty(max(m * n for m, _, n in sizes), device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for m, k, n in sizes:
            a, b = store[: m * k].view(m, k), store[largest : largest + k * n].view(k, n)
            torch.mm(a, b, out=out[: m * n].view(m, n))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return milliseconds(graph.replay), sum(2.0 * m * k * n for m, k, n in sizes)


def measure(
    size: str, ctx: int, rows: int, method: str, quant: str, ways: list[str], grad_cp: int
) -> Iterator[str]:
    """A table row a way."""
    clean()
    least, operations = floor(size, ctx * rows, method)
    name = method if quant == "none" else f"{method}, {quant}"
    guess = predict(size, method, quant, is_small=False, grad_cp=grad_cp, positions=ctx * rows)
    expected: tuple[float, Tensor] | None = None
    for way in ways:
        clean()
        start = (
            f"| {size} | {ctx} × {rows} | {name} | {way}{f', grad_cp {grad_cp}' * (grad_cp > 0)} | "
        )
        try:
            case: Any = Case(
                size, ctx, rows, method, "plain" if way == CONTROL else way, grad_cp, quant
            )
            if way == CONTROL:
                case = make_control(size, case)
            started = time.perf_counter()
            loss, gradient = case.gradients()
            first = time.perf_counter() - started
            expected = expected or (loss, gradient)
            error = ((gradient - expected[1]).norm() / expected[1].norm()).item()
            checked = f"{loss - expected[0]:+.1e} | {error:.1e}"
            if abs(loss - expected[0]) > 0.02 or error > LARGEST_ERROR:
                yield f"{start}refused: | | | | | | | {checked} | |"
                continue
            torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(case.take)
            peak, held = (
                f() / 2**30 for f in (torch.cuda.max_memory_allocated, torch.cuda.memory_reserved)
            )
            said = "–" if way == CONTROL else f"{guess:.1f}"
            yield (
                f"{start}{ms:.2f} | {ctx * rows / ms:,.1f} | {least:.2f} | {ms / least:.2f} | "
                f"{100 * operations / RATE / ms * 1e3:.0f} % | {said} | {peak:.1f} ({held:.1f}) | "
                f"{checked} | {first:.0f} |"
            )
        except torch.OutOfMemoryError:
            yield f"{start}out of memory | | | | | | | | | |"
        except Exception as error:
            yield f"{start}{type(error).__name__}: {str(error).strip().splitlines()[0][:200]} |"
        case = None


def measure_all(options: argparse.Namespace) -> Iterator[str]:
    """The table rows of all cases that were asked for."""
    for size, shape in itertools.product(options.sizes, options.shapes):
        ctx, rows = map(int, shape.split("x"))
        for case in itertools.product(options.methods, options.quants):
            yield from measure(size, ctx, rows, *case, options.ways, options.grad_cp)


def clean() -> None:
    """Gives back all memory of the case before."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[1:], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=["1024x1", "4096x1", "1024x8"])
    parser.add_argument("--methods", nargs="+", default=["lora", "miss", "state", "full"])
    parser.add_argument("--quants", nargs="+", default=["none"], choices=["none", *STORAGES])
    parser.add_argument("--ways", nargs="+", default=["plain", "compiled, graphed"])
    parser.add_argument("--grad_cp", type=int, default=0, choices=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    head = [
        f"{device_name()}, PyTorch {torch.__version__}; one optimizer step, bf16",
        "",
        "| size | ctx × rows | method | way | ms | kt/s | floor ms | ratio | share | GiB said "
        "| GiB (reserved) | loss | gradient | first s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with own_stream(torch.device("cuda")):
        report_as_found(head, measure_all(options), options.output)


if __name__ == "__main__":
    main()
