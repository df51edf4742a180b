"""Time of a generated token, sampling included, for the shapes of the released models.

    python benchmarks/generation.py [--sizes 0.1b 1.5b] [--tokens 200]

Random bf16 weights (float32 on a CPU), a prompt of 64 tokens, temperature 1 and top_p 0.5. The head
is enlarged until a few tokens are likely, as after training; of random weights all 65,536 would be
sorted. On a GPU a token is a CUDA graph; beside it stands the same session without one, and the
sampler alone. No figure is printed unless the last logits are those of the whole text read at once.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_step import SIZES, device_name, make_model
from report import report_as_found

from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.generation.engine import Session
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.models.base import RWKV

PROMPT, ROUNDS = 64, 5
# standard deviation of logits with which the 64 likeliest of 65,536 hold more than a half
SPREAD = 8.0
# of bf16 logits by one token at a time and by all at once, relative
DIFFERENCE = 0.05


def sharpen(model: RWKV, prompt: list[int]) -> None:
    """Enlarges the head until the logits of a text have the spread."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([prompt], device=model.emb.weight.device))
        model.head.weight.mul_(SPREAD / logits[0, -1].float().std())


def milliseconds(model: RWKV, prompt: list[int], count: int, *, has_graph: bool) -> float:
    """Of a token, the median of some rounds of `count` tokens."""
    tokenizer = Tokenizer(model.model_config.vocab_size)
    session = Session(model, tokenizer)
    session._step.is_used &= has_graph
    sampler = Sampler(Sampling(), model.model_config.vocab_size, seed=0)
    session.read(prompt)
    text, times = list(prompt), []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for _ in range(count):
            token = sampler.draw(session._logits)  # type: ignore[arg-type]
            session.read([token])
            text.append(token)
        times.append((time.perf_counter() - started) / count * 1e3)
    with torch.no_grad():
        whole = model(torch.tensor([text], device=model.emb.weight.device))[0][0, -1].float()
    difference = (session._logits.float() - whole).norm() / whole.norm()  # type: ignore[union-attr]
    if difference > DIFFERENCE:
        raise SystemExit(f"logits are {difference:.3f} off those of the whole text: no figures")
    # the first round captures
    return statistics.median(times[1:])


def draw_milliseconds(model: RWKV, prompt: list[int], count: int) -> float:
    """Of a draw alone."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt], device=model.emb.weight.device))[0][0, -1]
    sampler = Sampler(Sampling(), len(logits), seed=0)
    started = time.perf_counter()
    for _ in range(count):
        sampler.draw(logits)
    return (time.perf_counter() - started) / count * 1e3


def rows(sizes: list[str], count: int, device: torch.device) -> Iterator[str]:
    """A row of the table for each size."""
    for size in sizes:
        model = make_model(size, "auto", device).eval()
        prompt = list(range(1, PROMPT + 1))
        sharpen(model, prompt)
        found = [milliseconds(model, prompt, count, has_graph=x) for x in (True, False)]
        draw = draw_milliseconds(model, prompt, count)
        yield f"| {size} | {found[0]:.2f} | {found[1]:.2f} | {draw:.2f} |"


def main() -> None:
    """Prints the table, and writes it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=["0.1b", "1.5b"], choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    head = [
        f"{device_name()}, PyTorch {torch.__version__}; ms of a token",
        "",
        "| size | as a graph | without | draw alone |",
        "|---|---|---|---|",
    ]
    report_as_found(head, rows(options.sizes, options.tokens, device), options.output)


if __name__ == "__main__":
    main()
