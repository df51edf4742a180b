"""A training run on one device and on several, with the same rows in each optimizer step.

    python benchmarks/scaling.py [--sizes 1.5b] [--methods lora full] [--ways ddp fsdp]
        [--devices 2] [--ctx_len 4096] [--quant none nf4]

Random bf16 weights of the released shapes, random bytes as text, rows packed. Each way trains the
same steps with the same global batch as one device does. Losses are compared with those of one
device: where they differ by more than rounding to bf16 explains, no speed is given. Tokens a second
are the median of the steps after the first four; memory is the most that rank 0 had allocated.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
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


def take_rank(rank: int, count: int, port: int, options: dict[str, Any]) -> None:
    from rwkv_peft.config import TrainConfig
    from rwkv_peft.training.run import train

    if count > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        values = (rank, rank, count, count, port)
        os.environ |= {name: str(x) for name, x in zip(names, values, strict=True)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    train(TrainConfig(**options))


def run(count: int, options: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The records of the steps of a run on so many devices; None if it failed."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=take_rank, args=(rank, count, store.port, options))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        return None
    lines = Path(options["proj_dir"], "loss_data.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def make_files(folder: Path, size: str, rows: int, ctx_len: int) -> dict[str, Any]:
    from rwkv_peft.checkpoint.pth import write_weights

    model = make_model(size, "auto", torch.device("cuda"))
    weights = {name: x.detach().cpu() for name, x in model.named_parameters()}
    write_weights(folder / f"{size}.pth", weights)
    del model, weights
    torch.cuda.empty_cache()
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
        "compile": 0,
    }


def line_of(name: str, records: list[dict[str, Any]] | None, alone: list[dict[str, Any]]) -> str:
    if records is None:
        return f"| {name} | failed | | | |"
    pairs = zip(records, alone, strict=True)
    off = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
    speeds = [
        statistics.median(x["tokens"] / x["t_cost"] for x in found[WARM:])
        for found in (records, alone)
    ]
    if off > TOLERANCE:
        return f"| {name} | losses differ by {off:.1e} | | | |"
    memory = records[-1]["peak_memory"] / 2**30
    scale = speeds[0] / speeds[1]
    return f"| {name} | {off:.1e} | {speeds[0]:,.0f} | {scale:.2f} | {memory:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["1.5b"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=list(METHODS))
    parser.add_argument("--ways", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--quant", nargs="+", default=["none"])
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count())
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--micro_bsz", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        f"{device_name()}, torch {torch.__version__}, ctx_len {args.ctx_len}, "
        f"{args.micro_bsz} rows a micro-batch, {args.devices} micro-batches a step",
        "",
        "| run | losses off by | tokens/s | times one | GiB of rank 0 |",
        "|---|---|---|---|---|",
    ]
    rows = STEPS * args.devices * args.micro_bsz
    with tempfile.TemporaryDirectory() as name:
        for size in args.sizes:
            base = make_files(Path(name), size, rows, args.ctx_len)
            base |= {"ctx_len": args.ctx_len, "micro_bsz": args.micro_bsz}
            base["epoch_steps"] = STEPS * args.devices
            for method in args.methods:
                for quant in args.quant:
                    what = f"{size} {method} {quant}"
                    options = {**base, **METHODS[method], "quant": quant}
                    folder = f"{name}/{size}-{method}-{quant}"
                    own = {"accumulate_grad_batches": args.devices, "proj_dir": f"{folder}-1"}
                    alone = run(1, options | own)
                    assert alone is not None
                    lines.append(line_of(f"{what}, one", alone, alone))
                    print(lines[-1], flush=True)
                    for way in args.ways:
                        shared = {"strategy": way, "proj_dir": f"{folder}-{way}"}
                        found = run(args.devices, options | shared)
                        lines.append(line_of(f"{what}, {way}", found, alone))
                        print(lines[-1], flush=True)
    report(lines, args.output)


if __name__ == "__main__":
    main()
