"""How long a checkpoint stops a run, and how long its writing takes beside it.

    python benchmarks/checkpoint.py [--size 1.5b] [--method lora|none] [--rank 64] [--steps 40]

A model of a released shape with random bf16 weights is trained on random texts as a user would,
with a checkpoint every ten steps. The stop is the time from the end of a step to that of
`Checkpoints.save`, in which the run is copied to host memory; the write is what the thread takes
after that. The first stop includes the host memory that later ones find allocated. The bytes are
those of the files. No figure is printed unless the run that goes on from the middle checkpoint ends
with the bits of the one that did not stop.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_step import SIZES, device_name, make_model
from report import report

from rwkv_peft.checkpoint.pth import write_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.checkpoints import Checkpoints, folder_name
from rwkv_peft.training.run import train

EVERY = 10


def timed(times: list[float], original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            times.append(time.perf_counter() - started)

    return call


def write_files(folder: Path, size: str, device: torch.device) -> None:
    model = make_model(size, "auto", device)
    write_weights(folder / "model.pth", {n: x.detach().cpu() for n, x in model.named_parameters()})
    rng = random.Random(0)
    rows = [" ".join(str(rng.randrange(1000)) for _ in range(300)) for _ in range(400)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.5b", choices=SIZES)
    parser.add_argument("--method", default="lora", choices=["lora", "none"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="", help="where the files are written")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder = Path(name)
        write_files(folder, options.size, device)
        lora = {"r": options.rank, "lora_alpha": options.rank}
        config = TrainConfig(
            load_model=str(folder / "model.pth"),
            data_file=str(folder / "data.jsonl"),
            proj_dir=str(folder / "run"),
            peft=options.method,
            peft_config=lora if options.method == "lora" else {},
            ctx_len=1024,
            micro_bsz=1,
            epoch_count=1,
            epoch_steps=options.steps,
            random_seed=0,
            merge=0,
            save_every_steps=EVERY,
            keep=0,
        )
        stops: list[float] = []
        writes: list[float] = []
        Checkpoints.save = timed(stops, Checkpoints.save)  # type: ignore[method-assign]
        Checkpoints._write = timed(writes, Checkpoints._write)  # type: ignore[method-assign]
        whole = train(config)
        taken = list(stops), list(writes)
        middle = folder / "run" / folder_name(options.steps // EVERY // 2 * EVERY)
        resumed = train(replace(config, resume=str(middle), proj_dir=str(folder / "again")))
        assert whole.checkpoint and resumed.checkpoint
        files = [x / "tensors.safetensors" for x in (whole.checkpoint, resumed.checkpoint)]
        if files[0].read_bytes() != files[1].read_bytes():
            raise SystemExit("the run that went on ended otherwise: no figures")
        num_bytes = sum(x.stat().st_size for x in whole.checkpoint.iterdir())
    lines = [
        f"{device_name()}, {options.size}, {options.method}: {num_bytes / 2**20:,.0f} MiB",
        "",
        "| | first, s | median of later, s |",
        "|---|---|---|",
    ]
    for what, times in zip(("the run stops", "the thread writes"), taken, strict=True):
        lines.append(f"| {what} | {times[0]:.3f} | {statistics.median(times[1:]):.3f} |")
    report(lines, options.output)


if __name__ == "__main__":
    main()
