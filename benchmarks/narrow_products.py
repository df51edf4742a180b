"""Times of LoRA's narrow products on a GPU, and of ways to add one to a wide product.

    python benchmarks/narrow_products.py [--tokens 1024 4096] [--width 2048]

Rank 64, bf16, medians of graphs of 20 calls, whose tensors may lie in the cache. Ways to add
x W^T and u B^T: apart, for what comes next to add; onto the narrow one, which the wide one adds to
while it computes; onto a copy of the wide one, as `addmm` with another output does; and joined, as
one product of [x, u] and [W, B], which lie beside each other. The last four columns end in a
compiled squared ReLU, which reads what there is to read. Backward is dy W and g A.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_step import device_name
from report import report_as_found
from torch import Tensor

RANK, CALLS, ROUNDS = 64, 20, 5


def drawn(*shape: int) -> Tensor:
    """Random numbers in bf16."""
    return torch.randn(*shape, device="cuda").bfloat16()


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call within a graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / CALLS * 1e3)
    return statistics.median(times[1:])


def narrow(T: int, D: int) -> Iterator[str]:
    """Times of the products of one layer, and of three alike, one by one and together."""
    yield f"| {T} × {D} | µs | TB/s |"
    yield "|---|---|---|"
    for width in (D, 4 * D):
        x, a, b, u = drawn(T, width), drawn(RANK, width), drawn(width, RANK), drawn(T, RANK)
        products: list[tuple[str, Callable[[], Any]]] = [
            ("x A^T", lambda x=x, a=a: torch.mm(x, a.t())),
            ("dy B", lambda x=x, b=b: torch.mm(x, b)),
            ("u B^T", lambda u=u, b=b: torch.mm(u, b.t())),
            ("g^T x", lambda u=u, x=x: torch.mm(u.t(), x)),
            ("dy^T u", lambda u=u, x=x: torch.mm(x.t(), u)),
        ]
        for name, call in products:
            us = microseconds(call)
            yield f"| {name}, width {width} | {us:.1f} | {x.nbytes / us / 1e6:.1f} |"
    x, a, b, u = drawn(3, T, D), drawn(3, RANK, D), drawn(3, D, RANK), drawn(3, T, RANK)
    together: list[tuple[str, Callable[[], Any]]] = [
        ("three x A^T", lambda: [torch.mm(y, z.t()) for y, z in zip(x, a, strict=True)]),
        ("as one batch", lambda: torch.bmm(x, a.transpose(1, 2))),
        ("three dy B", lambda: [torch.mm(y, z) for y, z in zip(x, b, strict=True)]),
        ("as one batch", lambda: torch.bmm(x, b)),
        ("three g^T x", lambda: [torch.mm(y.t(), z) for y, z in zip(u, x, strict=True)]),
        ("as one batch", lambda: torch.bmm(u.transpose(1, 2), x)),
        ("three dy^T u", lambda: [torch.mm(y.t(), z) for y, z in zip(x, u, strict=True)]),
        ("as one batch", lambda: torch.bmm(x.transpose(1, 2), u)),
    ]
    for name, call in together:
        us = microseconds(call)
        yield f"| {name} | {us:.1f} | {x.nbytes / us / 1e6:.1f} |"
    yield ""


@torch.compile(dynamic=False)
def _add_and_square(wide: Tensor, thin: Tensor) -> Tensor:
    return torch.relu(wide + thin).square()


@torch.compile(dynamic=False)
def _square(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def sums(T: int, D: int) -> Iterator[str]:
    """Times of the ways to add two products, after what they give was compared."""
    ways = ["apart", "onto", "copied", "joined"]
    used = [f"{way}, used" for way in ways]
    yield f"| µs | wide alone | {' | '.join([*ways, *used])} |"
    yield "|---" * (2 + 2 * len(ways)) + "|"
    for K, N in ((D, D), (D, 4 * D), (4 * D, D)):
        # [[W, B], [A, 0]], of which forward takes the first rows and backward the first columns
        beside = drawn(N + RANK, K + RANK)
        for title, all_x, all_w in (
            (f"{T} × {K} → {N}", drawn(T, K + RANK), beside[:N].t()),
            (f"backward, {T} × {N} → {K}", drawn(T, N + RANK), beside[:, :K]),
        ):
            times = " | ".join(f"{us:.1f}" for us in _times(all_x, all_w))
            yield f"| {title} | {times} |"
    yield ""


def _times(all_x: Tensor, all_w: Tensor) -> Iterator[float]:
    """Of the ways to compute the product of (T, K + r) and (K + r, N), whose last r are narrow."""
    width = all_x.shape[1] - RANK
    # as they lie where nothing is joined
    x, u = (part.contiguous() for part in all_x.split((width, RANK), 1))
    w, b = all_w.split((width, RANK))
    if all_w.stride(1) == 1:
        w, b = w.contiguous(), b.contiguous()
    else:
        w, b = w.t().contiguous().t(), b.t().contiguous().t()

    def apart() -> tuple[Tensor, Tensor]:
        return torch.mm(x, w), torch.mm(u, b)

    def onto() -> Tensor:
        return torch.mm(u, b).addmm_(x, w)

    def copied() -> Tensor:
        return torch.addmm(torch.mm(x, w), u, b)

    def joined() -> Tensor:
        return torch.mm(all_x, all_w)

    expected = all_x.double() @ all_w.double()
    for found in (sum(apart()), onto(), copied(), joined()):
        assert (found - expected).norm() <= 0.01 * expected.norm()
    yield microseconds(lambda: torch.mm(x, w))
    yield from map(microseconds, (apart, onto, copied, joined))
    yield microseconds(lambda: _add_and_square(*apart()))
    for way in (onto, copied, joined):
        yield microseconds(lambda way=way: _square(way()))


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    head = [f"{device_name()}, PyTorch {torch.__version__}; narrow products of rank {RANK}, bf16"]
    found = (
        row for T in options.tokens for make in (narrow, sums) for row in make(T, options.width)
    )
    with torch.no_grad():
        report_as_found([*head, ""], found, options.output)


if __name__ == "__main__":
    main()
