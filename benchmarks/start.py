"""Seconds from the command to the first step, those that an epoch's end takes, and of `doctor`.

    python benchmarks/start.py [--sizes 0.1b 1.5b] [--compile 0 auto] [--folder DIR]

A file of a released shape with random bf16 weights, which lies in the cache of files as it was just
written, is tuned by the command line on random texts, LoRA of rank 64, one row of 1024 tokens, two
epochs, each saved and merged into a model. The first step counts when it stands in loss_data.jsonl,
compiling included where blocks are compiled. The pause is the time from an epoch's last step to the
next one's first, less the median step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from checkpoint import write_files
from gpu_step import SIZES, device_name
from report import report_as_found

COMMAND = [sys.executable, "-m", "rwkv_peft.cli.main"]
STEPS, WAIT = 40, 0.005


def watch(arguments: list[str], folder: Path) -> list[float]:
    """When each step of a run stood in its log, in seconds from the start of the command."""
    log, found = folder / "loss_data.jsonl", list[float]()
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen([*COMMAND, *arguments], stdout=said, stderr=said) as process,
    ):
        while process.poll() is None:
            count = log.read_bytes().count(b"\n") if log.exists() else 0
            found += [time.perf_counter() - started] * (count - len(found))
            time.sleep(WAIT)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    return found


def rows(sizes: list[str], ways: list[str], folder: Path) -> Iterator[str]:
    """A row of the table for each size and way of compiling."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for size in sizes:
        write_files(folder, size, device)
        for way in ways:
            run = folder / f"run-{size}-{way}"
            adapter = json.dumps({"r": 64, "lora_alpha": 64})
            times = watch(
                ["train", str(folder / "model.pth"), str(folder / "data.jsonl"),
                 "--proj_dir", str(run), "--peft_config", adapter, "--ctx_len", "1024",
                 "--micro_bsz", "1", "--epoch_count", "2", "--epoch_steps", str(STEPS),
                 "--merge", "1", "--compile", way],
                run,
            )  # fmt: skip
            gaps = [after - before for before, after in pairwise(times)]
            step = statistics.median(gaps)
            yield f"| {size} | {way} | {times[0]:.1f} | {gaps[STEPS - 1] - step:.2f} | {step:.3f} |"


def main() -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=["0.1b", "1.5b"], choices=list(SIZES))
    parser.add_argument("--compile", nargs="+", default=["0", "auto"])
    parser.add_argument("--folder", help="where the files are written")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    subprocess.run([*COMMAND, "doctor"], check=True, capture_output=True)
    head = [
        f"{device_name()}, PyTorch {torch.__version__}; "
        f"doctor takes {time.perf_counter() - started:.1f} s",
        "",
        "| size | --compile | first step, s | pause at an epoch's end, s | a step, s |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = rows(options.sizes, options.compile, Path(name))
        report_as_found(head, found, options.output)


if __name__ == "__main__":
    main()
