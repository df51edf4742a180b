"""Loss on dialogues kept aside after state tuning at several learning rates.

    python benchmarks/state_rate.py [--rates 1e-3 1e-2 …] [--output FILE]

The bundled model learns a state alone from the bundled dialogues: from a few, seen often, and from
all of them once. The rate falls to a hundredth by half a cosine. The loss before training is
measured by each run itself, and must be the same in all.
"""

import argparse
import platform
import tempfile
from pathlib import Path

import torch
from report import report

from rwkv_peft import train
from rwkv_peft.assets import BASE_MODEL, DIALOGUES, HELD_OUT_DIALOGUES
from rwkv_peft.config import TrainConfig

RATES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
# name -> dialogues, and passes over them
AMOUNTS = {"16 dialogues, 10 passes": (16, 10), "539 dialogues, 1 pass": (539, 1)}
MICRO_BSZ = 8


def measure(rate: float, num_documents: int, passes: int, folder: Path) -> tuple[float, float]:
    """Loss on what is kept aside, before and after training."""
    lines = DIALOGUES.read_text(encoding="utf-8").splitlines(keepends=True)
    data = folder / f"first{num_documents}.jsonl"
    data.write_text("".join(lines[:num_documents]), encoding="utf-8")
    result = train(
        TrainConfig(
            load_model=str(BASE_MODEL),
            data_file=str(data),
            val_file=str(HELD_OUT_DIALOGUES),
            proj_dir=str(folder / f"{rate:g}-{num_documents}"),
            peft="state",
            lr_init=rate,
            lr_final=rate / 100,
            warmup_steps=0,
            micro_bsz=MICRO_BSZ,
            ctx_len=512,
            epoch_count=passes,
            epoch_save=passes,
            accelerator="cpu",
            precision="fp32",
            random_seed=0,
        )
    )
    losses = [x.loss for x in result.evaluations]
    return losses[0] or float("nan"), losses[-1] or float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    found: dict[str, dict[float, float]] = {}
    before: set[float] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, (num_documents, passes) in AMOUNTS.items():
            for rate in options.rates:
                untuned, tuned = measure(rate, num_documents, passes, Path(folder))
                before.add(round(untuned, 4))
                found.setdefault(name, {})[rate] = tuned
    if len(before) != 1:
        raise SystemExit(f"the loss before training is not one number: {sorted(before)}")
    lines = [f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    lines += ["", f"Untuned: {before.pop():.4f}", ""]
    lines += ["| rate | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for rate in options.rates:
        lines.append(f"| {rate:g} | " + " | ".join(f"{x[rate]:.4f}" for x in found.values()) + " |")
    report(lines, options.output)


if __name__ == "__main__":
    main()
