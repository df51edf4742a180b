"""A training run on one device and on several, with the same rows in each optimizer step.

    python benchmarks/scaling.py [--sizes 1.5b] [--methods lora full] [--ways ddp fsdp]
        [--devices 2] [--ctx_len 4096] [--quant none nf4] [--compile 1]
    python benchmarks/scaling.py --methods full --ways ddp fsdp
    python benchmarks/scaling.py --methods lora full --ways deepspeed_stage_1 deepspeed_stage_2
        deepspeed_stage_3 deepspeed_stage_2_offload
    python benchmarks/scaling.py --sizes bundled --methods full --ctx_len 64   # without a GPU

Random bf16 weights of the released shapes, random bytes as text, rows packed. Each way trains the
same steps with the same global batch as one device does. Losses are compared with those of one
device: where they differ by more than rounding to bf16 explains, no speed is given. Tokens a second
are the median of the steps after the first four; memory is the most that rank 0 had allocated. What
a run saved is compared too: how far its tensors are from those of one device, of their norm.
Several runs begin and end side by side (--jobs), but one alone takes its steps at a time.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_step import SIZES, device_name, make_model
from report import report

STEPS, WARM = 12, 4
# relative, of a mean over thousands of tokens, each of whose logits is rounded to 8 bits
TOLERANCE = 2e-3
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft": "lora", "peft_config": {"r": 64}, "merge": 0},
    "full": {"peft": "none"},
    "state": {"peft": "state"},
}


def find_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


# held by the run that takes its steps
_devices = threading.Lock()


class Turn:
    """When the ranks of a run may take their steps, and when they have taken them."""

    def __init__(self, context: Any) -> None:
        self._ready, self._taken = context.Semaphore(0), context.Semaphore(0)
        self._go = context.Event()

    def wait(self, step: int) -> None:
        """Called by a rank before its steps, 0 the first."""
        if step == 0:
            self._ready.release()
            self._go.wait()

    def end(self, step: int) -> None:
        """Called by a rank after its steps."""
        if step == STEPS - 1:
            self._taken.release()

    def give(self, ranks: list[Any]) -> None:
        """Lets the ranks take their steps once all are ready, alone; returns when one has ended."""

        def is_over(signal: Any) -> bool:
            while any(rank.is_alive() for rank in ranks):
                if signal.acquire(timeout=0.2):
                    return False
            return True

        if any(is_over(self._ready) for _ in ranks):
            return
        with _devices:
            self._go.set()
            any(is_over(self._taken) for _ in ranks)


def take_rank(rank: int, count: int, port: int, options: dict[str, Any], turn: Turn) -> None:
    from rwkv_peft.config import TrainConfig
    from rwkv_peft.training import loop
    from rwkv_peft.training.run import train

    take_step = loop.take_step

    def take_in_turn(run: Any, *args: Any) -> Any:
        step = run.progress.step
        turn.wait(step)
        record = take_step(run, *args)
        turn.end(step)
        return record

    loop.take_step = take_in_turn

    if count > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        values = (rank, rank, count, count, port)
        os.environ |= {name: str(x) for name, x in zip(names, values, strict=True)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # each has its share of the processor, as where the command starts them
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    train(TrainConfig(**options))


def run(count: int, options: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The records of the steps of a run on so many devices; None if it failed."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    turn = Turn(context)
    ranks = [
        context.Process(target=take_rank, args=(rank, count, store.port, options, turn))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    turn.give(ranks)
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        return None
    lines = Path(options["proj_dir"], "loss_data.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def make_files(folder: Path, size: str, rows: int, ctx_len: int) -> dict[str, Any]:
    from rwkv_peft.checkpoint.pth import write_weights

    device = find_device()
    model = make_model(size, "auto", device)
    weights = {name: x.detach().cpu().bfloat16() for name, x in model.named_parameters()}
    write_weights(folder / f"{size}.pth", weights)
    del model, weights
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(5000)]
    texts = [" ".join(draw.choices(words, k=ctx_len // 4)) for _ in range(rows * 2)]
    text = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "data.jsonl").write_text(text)
    return {
        "load_model": str(folder / f"{size}.pth"),
        "data_file": str(folder / "data.jsonl"),
        "random_seed": 0,
        "precision": "bf16",
        "epoch_count": 1,
        "check_files": 0,
    }


def compare_files(folder: Path, other: Path) -> float:
    """How far what a run saved is from what another did: the norm of the difference, of its own."""
    from safetensors.torch import load_file

    from rwkv_peft.checkpoint.pth import read_weights

    def read(folder: Path) -> dict[str, torch.Tensor]:
        adapter = folder / "rwkv-0-adapter" / "adapter_model.safetensors"
        return load_file(adapter) if adapter.exists() else dict(read_weights(folder / "rwkv-0.pth"))

    found, wanted = read(folder), read(other)
    assert found.keys() == wanted.keys()
    total = off = 0.0
    for name, x in wanted.items():
        total += float(x.float().square().sum(dtype=torch.float64))
        off += float((found[name].float() - x.float()).square().sum(dtype=torch.float64))
    return float((off / total) ** 0.5)


def line_of(
    name: str,
    records: list[dict[str, Any]] | None,
    alone: list[dict[str, Any]],
    folder: Path,
    other: Path,
) -> str:
    if records is None:
        return f"| {name} | failed | | | | |"
    pairs = zip(records, alone, strict=True)
    off = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
    speeds = [
        statistics.median(x["tokens"] / x["t_cost"] for x in found[WARM:])
        for found in (records, alone)
    ]
    if off > TOLERANCE:
        return f"| {name} | losses differ by {off:.1e} | | | | |"
    memory = records[-1]["peak_memory"] / 2**30
    scale = speeds[0] / speeds[1]
    files = compare_files(folder, other)
    return f"| {name} | {off:.1e} | {files:.1e} | {speeds[0]:,.0f} | {scale:.2f} | {memory:.1f} |"


def measure(
    case: tuple[str, str, str],
    args: argparse.Namespace,
    base: dict[str, Any],
    folder: Path,
    pool: ThreadPoolExecutor,
) -> Iterator[str]:
    """A table row for one device, and for each way of several."""
    size, method, quant = case
    options = {**base, **METHODS[method], "quant": quant}
    folders = {way: folder / f"{size}-{method}-{quant}-{way}" for way in ("one", *args.ways)}
    own = {"accumulate_grad_batches": args.devices, "proj_dir": str(folders["one"])}
    alone = pool.submit(run, 1, options | own)
    found = {
        way: pool.submit(
            run, args.devices, options | {"strategy": way, "proj_dir": str(folders[way])}
        )
        for way in args.ways
    }
    records = alone.result()
    assert records is not None
    for way, future in {"one": alone, **found}.items():
        yield line_of(
            f"{' '.join(case)}, {way}", future.result(), records, folders[way], folders["one"]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["1.5b"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=list(METHODS))
    parser.add_argument("--ways", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--quant", nargs="+", default=["none"])
    parser.add_argument("--devices", type=int, default=torch.accelerator.device_count() or 2)
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--micro_bsz", type=int, default=2)
    parser.add_argument("--compile", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        f"{device_name()}, torch {torch.__version__}, ctx_len {args.ctx_len}, "
        f"{args.micro_bsz} rows a micro-batch, {args.devices} micro-batches a step",
        "",
        "| run | losses off by | files off by | tokens/s | times one | GiB of rank 0 |",
        "|---|---|---|---|---|---|",
    ]
    rows = STEPS * args.devices * args.micro_bsz
    with tempfile.TemporaryDirectory() as name:
        for size in args.sizes:
            base = make_files(Path(name), size, rows, args.ctx_len)
            base |= {"compile": args.compile, "ctx_len": args.ctx_len, "micro_bsz": args.micro_bsz}
            base["epoch_steps"] = STEPS * args.devices
            cases = [(size, *x) for x in itertools.product(args.methods, args.quant)]
            with ThreadPoolExecutor(args.jobs) as pool:
                for case in cases:
                    for line in measure(case, args, base, Path(name), pool):
                        print(line, flush=True)
                        lines.append(line)
    report(lines, args.output)


if __name__ == "__main__":
    main()
