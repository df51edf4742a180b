"""Time and memory of exports: `python benchmarks/export.py [--formats gguf st] [--n_layer 32]`.

Writes an RWKV-7 file of random bf16 values, by default of 7.2B parameters, and exports it to each
format, each in a process of its own. CPU seconds are those of the process, which depend less on
what else the machine does. Memory is what the process holds beside mapped files (RssAnon of Linux,
sampled every few milliseconds) above what it held before, when all was imported and a small export
was done. A figure is printed only after rows of the exported file, read by the packages `gguf` and
`safetensors` or by PyTorch, were compared with those of the model.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from merge import TINY, Memory, make_base, run_task
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.data.templates import TEMPLATES
from rwkv_peft.exports import export
from rwkv_peft.exports.formats import FORMATS

# a format, and a dtype of it if another than its first
FORMS = ("gguf", "gguf:q8_0", "st", "bin", "hf", "hf-fla", "pth")
# a matrix that lies in every format as in the model, by its name there
MATRIX = "blocks.{i}.ffn.value.weight"
FOREIGN = {
    "gguf": "blk.{i}.channel_mix_value.weight",
    "hf": f"model.{MATRIX}",
    "hf-fla": "model.layers.{i}.ffn.value.weight",
}
# half a step, of which 127 are the largest number of 32 beside it, and the step's rounding to fp16
TOLERANCE = {"q8_0": 0.5 / 127 + 2**-11}


def measure(base: Path, folder: Path, form: str) -> dict[str, Any]:
    """Seconds and bytes of one export, and whether its result is right."""
    to, _, dtype = form.partition(":")
    output = folder / f"exported{FORMATS[to].ending}"
    compare, seconds = export.compare, 0.0

    def timed(*given: Any) -> str:
        nonlocal seconds
        started = time.perf_counter()
        line = compare(*given)
        seconds = time.perf_counter() - started
        return line

    export.compare = timed
    given: dict[str, Any] = {"dtype": dtype, "template": TEMPLATES["chat"], "overwrite": True}
    export.export(folder / "tiny.pth", output, to, **given)
    memory = Memory()
    memory.start()
    started, busy = time.perf_counter(), time.process_time()
    export.export(base, output, to, **given)
    total, busy, peak = time.perf_counter() - started, time.process_time() - busy, memory.end()
    right = is_right(base, output, to, dtype)
    return {
        "seconds": total,
        "compared": seconds,
        "busy": busy,
        "peak": peak,
        "is_right": right,
    }


def is_right(base: Path, output: Path, to: str, dtype: str) -> bool:
    """Whether rows of the exported file are those of the model, rounded once."""
    wanted, find = read_weights(base), reader(output, to)
    layers = sum(name.endswith(".ffn.value.weight") for name in wanted)
    for i in sorted({0, layers // 2, layers - 1}):
        rows = wanted[MATRIX.format(i=i)][::997].float()
        found = find(FOREIGN.get(to, MATRIX).format(i=i))[::997].float()
        if dtype:
            blocks = rows.view(len(rows), -1, 32)
            error = (found - rows).abs().view_as(blocks)
            if bool((error > TOLERANCE[dtype] * blocks.abs().amax(-1, True) + 1e-7).any()):
                return False
        elif not torch.equal(found, rows if to[:2] in ("hf", "pt") else rows.half().float()):
            return False
    return True


def reader(path: Path, to: str) -> Callable[[str], Tensor]:
    """What gives a tensor of an exported file by its name there."""
    if to == "gguf":
        import gguf

        held = {x.name: x for x in gguf.GGUFReader(path).tensors}
        return lambda name: torch.from_numpy(
            gguf.quants.dequantize(held[name].data, held[name].tensor_type)
        )
    if to == "pth":
        return torch.load(path, mmap=True, weights_only=True).__getitem__
    if to == "bin":
        return lambda name: FORMATS[to].read(path)[name].whole()
    from safetensors import safe_open

    def find(name: str) -> Tensor:
        for file in sorted(path.glob("*.safetensors")) or [path]:
            with safe_open(file, "pt") as held:
                if name in held.keys():  # noqa: SIM118
                    return held.get_tensor(name)
        raise KeyError(name)

    return find


def parse() -> argparse.Namespace:
    """The sizes of the model, and what it is exported to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--n_layer", type=int, default=32)
    parser.add_argument("--n_embd", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--folder", type=Path, help="where twice the file's size is free")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", choices=("base", "export"), help=argparse.SUPPRESS)
    parser.add_argument("--name", default="base", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs every task and prints a table."""
    options = parse()
    if options.task == "base":
        return make_base(options.folder / f"{options.name}.pth", options)
    if options.task == "export":
        base, (form,) = options.folder / "base.pth", options.formats
        return print(json.dumps(measure(base, options.folder, form)))
    sizes = [f"--{n}={getattr(options, n)}" for n in ("n_layer", "n_embd", "vocab_size")]
    results = []
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        run_task(__file__, "base", folder, sizes)
        run_task(__file__, "base", folder, ["--name", "tiny", *TINY])
        size = (folder / "base.pth").stat().st_size
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; file "
            f"{size / 1e9:.1f} GB\n\n| format | seconds | of them comparing | CPU seconds | "
            "extra memory, MiB |\n|---|---|---|---|---|",
            flush=True,
        )
        for form in options.formats:
            found = json.loads(run_task(__file__, "export", folder, ["--formats", form]))
            results.append({"format": form, **found})
            print(row(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results))


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    if not found["is_right"]:
        return f"| {found['format']} | not measured: the exported file is wrong | | | |"
    seconds = f"{found['seconds']:.1f} | {found['compared']:.1f} | {found['busy']:.1f}"
    return f"| {found['format']} | {seconds} | {found['peak'] / 2**20:.0f} |"


if __name__ == "__main__":
    main()
