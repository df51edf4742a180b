"""Whether a commit changes what training writes: small runs on two commits, compared bit by bit.

    python benchmarks/compare_commits.py REV

Each run is the same command line on the CPU with one thread, by the code of REV and by that of this
tree. Models, data and comparison are made here, with nothing of either. Prints a line a run: how
many tensors it wrote, and whether all of them, the losses and the names of the files are the same.
Exit code 1 if one is not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

L, D, F, H, N, V, R = 2, 128, 448, 2, 64, 320, 32
METHODS: dict[str, list[str]] = {
    "full": ["--peft", "none", "--weight_decay", "0.1"],
    "lora": ["--peft", "lora", "--peft_config", '{"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}'],
    "pissa": ["--peft", "pissa", "--peft_config", '{"r": 8, "svd_niter": 4}'],
    "miss": ["--peft", "miss", "--peft_config", '{"r": 8}'],
    "state": ["--peft", "state"],
}
SHAPES: dict[str, list[str]] = {
    "packed": ["--dataload", "pack", "--grad_cp", "0"],
    "padded": ["--dataload", "pad", "--accumulate_grad_batches", "3", "--grad_cp", "1"],
}
# on RWKV-7 alone
FURTHER: dict[str, list[str]] = {
    "lora bf16 packed": ["--precision", "bf16", *METHODS["lora"], *SHAPES["packed"]],
    "full bf16 padded": ["--precision", "bf16", *METHODS["full"], *SHAPES["padded"]],
    "full fp16": ["--precision", "fp16", *METHODS["full"], *SHAPES["packed"]],
    "lora windows": ["--dataload", "get", *METHODS["lora"]],
    "lora and parts": ["--train_parts", "ln,time", *METHODS["lora"], "--lr_schedule", "wsd"],
    "fullstate": ["--train_type", "fullstate"],
    "adalora": ["--peft", "adalora", "--peft_config", '{"init_r": 6, "target_r": 3, "tinit": 1}'],
    "dora": ["--peft", "lora", "--peft_config", '{"r": 8, "use_dora": true}'],
    "chosen": [],
}


def shapes_of(version: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a small model's tensors, in the order of official files."""
    yield "emb.weight", (V, D)
    for i in range(L):
        for norm in ("ln1", "ln2", *(("ln0",) if i == 0 else ())):
            yield from ((f"blocks.{i}.{norm}.{leaf}", (D,)) for leaf in ("weight", "bias"))
        for name, shape in mixers(version, i):
            yield f"blocks.{i}.{name}", shape
    yield from ((f"ln_out.{leaf}", (D,)) for leaf in ("weight", "bias"))
    yield "head.weight", (V, D)


def mixers(version: str, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of time mixing and channel mixing."""
    if version == "v7":
        yield from ((f"att.x_{x}", (1, 1, D)) for x in "rwkvag")
        for x in "wavg" if layer else "wag":
            yield from (() if x == "g" else ((f"att.{x}0", (1, 1, D)),))
            yield from ((f"att.{x}1", (D, R)), (f"att.{x}2", (R, D)))
        yield from (("att.k_k", (1, 1, D)), ("att.k_a", (1, 1, D)), ("att.r_k", (H, N)))
    elif version == "v6":
        yield from ((f"att.time_maa_{x}", (1, 1, D)) for x in "xwkvrg")
        yield from (("att.time_maa_w1", (D, 5 * R)), ("att.time_maa_w2", (5, R, D)))
        yield from (("att.time_decay", (1, 1, D)), ("att.time_decay_w1", (D, R)))
        yield from (("att.time_decay_w2", (R, D)), ("att.time_faaaa", (H, N)))
    else:
        yield from ((f"att.time_mix_{x}", (1, 1, D)) for x in "kvrg")
        yield from (("att.time_decay", (H, N)), ("att.time_faaaa", (H, N)))
    matrices = ("receptance", "key", "value", "output", *(() if version == "v7" else ("gate",)))
    yield from ((f"att.{x}.weight", (D, D)) for x in matrices)
    yield from ((f"att.ln_x.{leaf}", (D,)) for leaf in ("weight", "bias"))
    if version == "v7":
        yield "ffn.x_k", (1, 1, D)
    else:
        kind = "maa" if version == "v6" else "mix"
        yield from ((f"ffn.time_{kind}_{x}", (1, 1, D)) for x in "kr")
        yield "ffn.receptance.weight", (D, D)
    yield from (("ffn.key.weight", (F, D)), ("ffn.value.weight", (D, F)))


def make_model(version: str, path: Path) -> None:
    """Writes a model of random weights of the size that trained ones have."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes_of(version):
        x = torch.randn(shape, generator=generator) * (0.08 if len(shape) == 2 else 0.3)
        if name.endswith(("ln1.weight", "ln2.weight", "ln0.weight", "ln_x.weight", "out.weight")):
            x = 1 + 0.1 * x
        if name.endswith("time_decay"):
            x = x - 3
        weights[name] = x.bfloat16()
    torch.save(weights, path)


def make_data(path: Path) -> None:
    """Writes texts and dialogues of many lengths."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "then",
        "it",
        "rests",
    ]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(24):
            said = " ".join(words[(i * j) % len(words)] for j in range(3 + i % 9))
            turns = [
                {"role": "user", "content": said},
                {"role": "assistant", "content": said[::-1]},
            ]
            row: dict[str, Any] = {"messages": turns} if i % 3 else {"text": said * (1 + i % 5)}
            file.write(json.dumps(row) + "\n")


def train(tree: Path, model: Path, data: Path, folder: Path, flags: list[str]) -> None:
    """Trains by the code of a tree."""
    command = [sys.executable, "-m", "rwkv_peft.cli.main", "train", str(model), str(data)]
    common = ["--epoch_count", "2", "--micro_bsz", "2", "--ctx_len", "64", "--random_seed", "7"]
    common += ["--lr_init", "1e-2", "--accelerator", "cpu", "--warmup_steps", "2"]
    given = common if not flags or "--precision" in flags else [*common, "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *given, *flags, "--proj_dir", str(folder)],
        env=environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(flags)}: {done.stderr[-2000:]}")


def written(folder: Path) -> dict[str, Any]:
    """All that a run wrote and that must stay as it is, by name."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = None
        if path.suffix == ".pth":
            tensors = torch.load(path, weights_only=True)
            found |= {f"{name}:{key}": x for key, x in tensors.items()}
            found[name] = list(tensors)
        elif path.suffix == ".safetensors":
            found |= {f"{name}:{key}": x for key, x in load_file(path).items()}
        elif name == "loss_data.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            keys = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens")
            found[name] = [[record[key] for key in keys] for record in records]
        elif name.endswith(".json") and "report" not in name:
            settings = json.loads(path.read_text())
            found[name] = {k: v for k, v in settings.items() if k != "base_model_name_or_path"}
    return found


def same(x: Any, y: Any) -> bool:
    """Whether two things that runs wrote are equal, tensors in type and bits."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    return bool(x == y)


def main(args: list[str] | None = None) -> int:
    """Compares and prints; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rev")
    parser.add_argument("--only", default="", help="runs whose names hold this")
    options = parser.parse_args(args)
    here = Path(__file__).resolve().parents[1]
    runs = {
        f"{version} {method} {shape}": [*METHODS[method], *SHAPES[shape]]
        for version in ("v7", "v6", "v5.2")
        for method in METHODS
        for shape in SHAPES
        if (method, shape) != ("state", "packed")
    }
    runs |= {f"v7 {name}": flags for name, flags in FURTHER.items()}
    runs = {name: flags for name, flags in runs.items() if options.only in name}
    num_different = 0
    with tempfile.TemporaryDirectory() as temporary:
        work, there = Path(temporary), Path(temporary) / "tree"
        git = ["git", "-C", str(here), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(there), options.rev], check=True)
        try:
            make_data(work / "data.jsonl")
            for version in ("v7", "v6", "v5.2"):
                make_model(version, work / f"{version}.pth")
            for name, flags in runs.items():
                found = []
                for kind, tree in (("old", there), ("new", here)):
                    folder = work / f"{name}-{kind}".replace(" ", "_")
                    model = work / f"{name.split()[0]}.pth"
                    train(tree, model, work / "data.jsonl", folder, flags)
                    found.append(written(folder))
                old, new = found
                other = sorted(
                    n for n in old.keys() | new.keys() if not same(old.get(n), new.get(n))
                )
                count = sum(isinstance(x, Tensor) for x in old.values())
                num_different += bool(other)
                verdict = f"{len(other)} differ: {', '.join(other[:4])}" if other else "the same"
                print(f"{name:<24} {count:4} tensors, losses and files: {verdict}", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)
    print(f"{len(runs) - num_different} of {len(runs)} runs are the same as on {options.rev}")
    return int(bool(num_different))


if __name__ == "__main__":
    sys.exit(main())
