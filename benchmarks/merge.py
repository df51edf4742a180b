"""Time and memory of merging: `python benchmarks/merge.py [--methods lora miss] [--n_layer 32]`.

Writes an RWKV-7 file of random bf16 values, by default of 7.2B parameters, and an adapter for each
method, and merges them, each in a process of its own, once alone and once with the comparison of
answers. Memory is what the process holds beside mapped files (RssAnon of Linux, sampled every few
milliseconds) above what it held before, when all was imported and a small merge was done. A figure
is printed only after rows of the merged file were compared with W + s B A, or W and D, in float64,
or for other methods the file's answers with those of peft's own forward.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import read_adapter, write_adapter
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.merge import merge
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.checkpoint.stream import Spec, write_tensors
from rwkv_peft.methods.attach import PREFIX, attach
from rwkv_peft.models import build
from rwkv_peft.models.config import ModelConfig

# of the released 7.2B
RANKS = {"w": 128, "a": 128, "v": 96, "g": 480}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"r": 16, "use_dora": True}),
    "miss": ("miss", {"r": 64}),
    "bat": ("miss", {"r": 64, "init_weights": "bat"}),
    "adalora": ("adalora", {"total_step": 100}),
    "boft": ("boft", {"boft_block_size": 4}),
    "oft": ("oft", {"oft_block_size": 32}),
    "lora": ("lora", {"r": 16}),
}
TINY = ("--n_layer", "1", "--n_embd", "128", "--vocab_size", "320")
BLOCK = 1 << 22


def make_base(path: Path, options: argparse.Namespace) -> None:
    """Writes values of the size of trained ones, a piece at a time."""
    width = options.n_embd
    model_config = ModelConfig(
        "x070", options.n_layer, width, width, 4 * width, 64, options.vocab_size, RANKS
    )
    tensors = dict(build(model_config, op="torch").named_parameters())
    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))

    def pieces(name: str) -> Iterator[Tensor]:
        shape = tensors[name].shape
        if ".ln" in name or "ln_" in name:
            yield torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            return
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.3
        left = shape.numel()
        while left:
            # pieces that begin elsewhere, so that no two rows are alike
            start = left % 4099
            values = drawn[start : start + min(left, BLOCK - 4099)] * scale
            left -= len(values)
            yield values.bfloat16()

    specs = {name: Spec(tuple(x.shape), torch.bfloat16) for name, x in tensors.items()}
    write_tensors(path, specs, pieces)


def make_adapter(base: Path, folder: Path, name: str) -> None:
    """Writes an adapter of random values, small as those of a short training are."""
    weights = read_weights(base)
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights, dtype=None)
    trained = attach(model, *OPTIONS.get(name, (name, {})))
    generator = torch.Generator().manual_seed(1)
    values = {
        n: p.detach().float() + torch.randn(p.shape, generator=generator) * 0.01
        for n, p in trained.items()
    }
    write_adapter(folder, trained, values, base=base, base_fingerprint=fingerprint(weights))


class Memory(threading.Thread):
    """The most that this process holds beside mapped files, above what it held at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._first, self.peak, self._is_over = self._held(), 0, threading.Event()

    @staticmethod
    def _held() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        """Samples until the end."""
        while not self._is_over.wait(0.002):
            self.peak = max(self.peak, self._held() - self._first)

    def end(self) -> int:
        """Stops and gives the peak in bytes."""
        self._is_over.set()
        self.join()
        return self.peak


def measure(base: Path, folder: Path, name: str, compared: int) -> dict[str, Any]:
    """Seconds and bytes of one merge, and whether its result is right."""
    output = folder / "merged.pth"
    merge(folder / "tiny.pth", folder / f"tiny-{name}", output, compare=8, overwrite=True)
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    report = merge(base, folder / name, output, compare=compared, overwrite=True)
    seconds, peak = time.perf_counter() - started, memory.end()
    return {
        "seconds": seconds,
        "peak": peak,
        "is_right": is_right(base, folder / name, output, name, report.comparison),
    }


def is_right(base: Path, adapter: Path, output: Path, name: str, comparison: Any) -> bool:
    """Whether rows of the merged file are those of the method's equation, rounded once."""
    if name not in ("lora", "miss"):
        return comparison is None or not comparison.is_far
    saved, before, after = read_adapter(adapter), read_weights(base), read_weights(output)
    tensors = {n.removeprefix(PREFIX): x.double() for n, x in saved.tensors.items()}
    modules = sorted({n.rpartition(".lora_")[0] or n.rpartition(".")[0] for n in tensors})
    for module in (modules[0], modules[len(modules) // 2], modules[-1]):
        rows = torch.arange(0, before[f"{module}.weight"].shape[0], 997)
        weight = before[f"{module}.weight"][rows].double()
        if name == "lora":
            config: Any = saved.config
            scale = config.lora_alpha / config.r
            change = tensors[f"{module}.lora_B.weight"][rows] @ tensors[f"{module}.lora_A.weight"]
            exact = weight + scale * change
        else:
            block = tensors[f"{module}.miss_block"][:, rows]
            exact = weight + block[torch.arange(weight.shape[1]) % len(block)].t()
        error = (after[f"{module}.weight"][rows].double() - exact).abs()
        # half a step of bf16, and the rounding of the float32 sum
        if bool((error > 2**-8 * 1.001 * exact.abs() + 1e-7).any()) or exact.equal(weight):
            return False
    return True


def run_task(script: str, task: str, folder: Path, arguments: list[str]) -> str:
    """One task of a benchmark in a process of its own; its last line."""
    command = [sys.executable, script, "--task", task, "--folder", str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def parse() -> argparse.Namespace:
    """The sizes of the file, and what is merged into it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", default=["lora", "miss"])
    parser.add_argument("--n_layer", type=int, default=32)
    parser.add_argument("--n_embd", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--compared", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--folder", type=Path, help="where twice the file's size is free")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", choices=("base", "adapter", "merge"), help=argparse.SUPPRESS)
    parser.add_argument("--name", default="base", help=argparse.SUPPRESS)
    return parser.parse_args()


def do(options: argparse.Namespace) -> None:
    """A task of this process."""
    # peft warns of layers that it knows well enough
    warnings.simplefilter("ignore")
    folder, name = options.folder, options.name
    if options.task == "base":
        make_base(folder / f"{name}.pth", options)
    elif options.task == "adapter":
        make_adapter(folder / f"{name}.pth", folder / options.methods[0], options.methods[0])
        make_adapter(folder / "tiny.pth", folder / f"tiny-{options.methods[0]}", options.methods[0])
    else:
        found = measure(folder / "base.pth", folder, options.methods[0], options.compared[0])
        print(json.dumps(found))


def main() -> None:
    """Runs every task and prints a table."""
    options = parse()
    if options.task:
        do(options)
        return
    sizes = ["--n_layer", str(options.n_layer), "--n_embd", str(options.n_embd)]
    sizes += ["--vocab_size", str(options.vocab_size)]
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        run_task(__file__, "base", folder, sizes)
        run_task(__file__, "base", folder, ["--name", "tiny", *TINY])
        weights = read_weights(folder / "base.pth")
        layer = sum(x.nbytes for n, x in weights.items() if n.startswith("blocks.0."))
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; file "
            f"{(folder / 'base.pth').stat().st_size / 1e9:.1f} GB, one layer {layer / 2**20:.0f} "
            "MiB\n\n| method | tokens compared | seconds | extra memory, MiB | of one layer |\n"
            "|---|---|---|---|---|",
            flush=True,
        )
        for method in options.methods:
            run_task(__file__, "adapter", folder, ["--methods", method])
            for compared in options.compared:
                given = ["--methods", method, "--compared", str(compared)]
                found = json.loads(run_task(__file__, "merge", folder, given))
                results.append({"method": method, "compared": compared, "layer": layer, **found})
                print(row(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results))


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    begin = f"| {found['method']} | {found['compared']} |"
    if not found["is_right"]:
        return f"{begin} not measured: the merged file is wrong | | |"
    share = found["peak"] / found["layer"]
    return f"{begin} {found['seconds']:.1f} | {found['peak'] / 2**20:.0f} | {share:.2f} |"


if __name__ == "__main__":
    main()
