"""Trained tokens a second of packed rows against padded ones, on short documents.

    python benchmarks/packing.py [--size bundled] [--micro_bsz 1] [--output FILE]

Documents of 150 tokens on average (lognormal, 8 to 1024) in rows of 1024: packed; padded to
`ctx_len`, as older versions did; and padded to the longest of micro-batches of like lengths, as
`--dataload pad` does. Whole steps of LoRA of rank 32 with random weights: forward, backward, clip,
AdamW. The ways take turns, and count what has a loss. All see the same tokens in a pass, which is
checked first.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gpu_step import SIZES, device_name, make_model, make_optimizer, timed_step
from report import report

from rwkv_peft.data.batching import IGNORE, Batch, Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.models.base import RWKV
from rwkv_peft.training.optim import Optimizer

CTX_LEN, MEAN, DOCUMENTS = 1024, 150, 4000
WAYS = ("padded to ctx_len", "pad", "pack")


def make_documents(vocab_size: int) -> Documents:
    """Random tokens in documents of the lengths of short dialogues."""
    rng = np.random.default_rng(0)
    spread = 0.7
    lengths = rng.lognormal(np.log(MEAN) - spread**2 / 2, spread, DOCUMENTS)
    starts = np.cumsum([0, *np.clip(lengths.round(), 8, CTX_LEN).astype(np.int64)])
    return Documents(
        paths=("random",),
        tokens=rng.integers(1, vocab_size, starts[-1], dtype=np.int32),
        starts=starts,
        lines=np.arange(1, DOCUMENTS + 1),
        sources=np.zeros(DOCUMENTS, dtype=np.uint8),
    )


class Way:
    """One way to lay documents out, over one model."""

    def __init__(self, name: str, documents: Documents, micro_bsz: int) -> None:
        self.name, self.tokens, self.seconds, self.position = name, 0, 0.0, 0
        self.batches = Batches(
            documents,
            dataload="pack" if name == "pack" else "pad",
            ctx_len=CTX_LEN,
            micro_bsz=micro_bsz,
            seed=0,
            is_shuffled=True,
        )

    def batch(self, position: int) -> Batch:
        """The micro-batch after `position` others."""
        batch = self.batches[position]
        if self.name != "padded to ctx_len":
            return batch
        room = (0, CTX_LEN - batch.tokens.shape[1])
        return batch._replace(
            tokens=F.pad(batch.tokens, room), targets=F.pad(batch.targets, room, value=IGNORE)
        )

    def step(self, model: RWKV, optimizer: Optimizer) -> None:
        """One optimizer step of one micro-batch, made and trained."""
        started = time.perf_counter()
        batch = self.batch(self.position)
        making = time.perf_counter() - started
        self.position += 1
        self.seconds += making + timed_step(model, optimizer, batch)[1]
        self.tokens += batch.num_trained

    @property
    def rate(self) -> float:
        """Trained tokens a second."""
        return self.tokens / self.seconds


def measure(size: str, micro_bsz: int, seconds: float) -> list[Way]:
    """Each way for `seconds` of steps, in turns."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = make_model(size, "auto", device)
    optimizer = make_optimizer(model, "lora")
    documents = make_documents(model.model_config.vocab_size)
    ways = [Way(name, documents, micro_bsz) for name in WAYS]
    for way in ways:
        seen = sum(way.batches[i].num_trained for i in range(len(way.batches)))
        assert seen == documents.num_trained, way.name
        for _ in range(3):
            way.step(model, optimizer)
        way.tokens, way.seconds = 0, 0.0
    while min(way.seconds for way in ways) < seconds:
        # the one that is behind, so that a drifting machine is the same for all
        min(ways, key=lambda way: way.seconds).step(model, optimizer)
    return ways


def main(args: list[str] | None = None) -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="bundled", choices=list(SIZES))
    parser.add_argument("--micro_bsz", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(args)
    ways = measure(options.size, options.micro_bsz, options.seconds)
    lines = [
        f"{device_name()}, torch {torch.__version__}, model {options.size}, "
        f"micro_bsz {options.micro_bsz}",
        "",
        "| rows | micro-batches a pass | trained tokens/s | against padded to ctx_len |",
        "|---|---|---|---|",
        *(
            f"| {way.name} | {len(way.batches):,} | {way.rate:,.0f} | "
            f"{way.rate / ways[0].rate:.2f} |"
            for way in ways
        ),
    ]
    report(lines, options.output)


if __name__ == "__main__":
    main()
