"""What ranks hold of a frozen base that they share, while it is loaded and an adapter saved."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.methods import residual
from rwkv_peft.models.initial import initial_weights
from rwkv_peft.parallel.strategy import take_part
from rwkv_peft.quant import linear
from rwkv_peft.training.follow import go_on, serve
from rwkv_peft.training.prepare import prepare_run
from tests.conftest import make_model_config
from tests.processes import become_rank, run_ranks

RANKS, LAYERS, WIDTH = 2, 12, 128
CASES: dict[str, dict[str, Any]] = {
    "lora": {"peft": "lora", "peft_config": {"r": 4}},
    "lora_nf4": {"peft": "lora", "peft_config": {"r": 4}, "quant": "nf4"},
    "pissa": {"peft": "pissa", "peft_config": {"r": 4}},
    "pissa_int8": {"peft": "pissa", "peft_config": {"r": 4}, "quant": "int8"},
    "dora": {"peft": "lora", "peft_config": {"r": 4, "use_dora": True}},
    "state": {"peft": "state"},
}
# those that look at the weights when they begin
READING = ("pissa", "pissa_int8", "dora")
# those that the default suite takes
FAST = ("lora", "lora_nf4")


class Measured(NamedTuple):
    """The most bytes that loading and saving took, and how many numbers are trained."""

    loading: int
    saving: int
    trained: int


@contextmanager
def counted() -> Iterator[list[int]]:
    """A list that has in the end the most bytes that PyTorch has allocated meanwhile."""
    most: list[int] = []
    with profile(profile_memory=True) as found:
        yield most
    results: Any = found.kineto_results
    events = [x for x in results.events() if x.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    most.append(top)


def take_rank(rank: int, port: int, configs: Mapping[str, TrainConfig], folder: Path) -> None:
    """One of two processes, which prepares each run and saves what it begins with."""
    torch.set_num_threads(1)
    # as small beside a block as they are beside those of a real model
    linear.PIECE, residual.ROWS = 1 << 13, 16
    for number, (name, config) in enumerate(configs.items()):
        become_rank(rank, RANKS, port, number)
        with take_part(config) as strategy:
            with counted() as loading:
                run, _ = prepare_run(config, strategy=strategy)
            with counted() as saving:
                if rank:
                    serve(run)
                else:
                    run.target.save(folder / name, run.values, merges=False)
                    go_on(run)
        trained = sum(x.numel() for x in run.target.parameters.values())
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps([*loading, *saving, trained]))


def measure(folder: Path, names: Sequence[str]) -> tuple[dict[str, Measured], dict[str, Tensor]]:
    """What runs of these names took, and the base."""
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "dim_att": WIDTH, "dim_ffn": 4 * WIDTH}
    model_config = make_model_config(**sizes, ranks=dict.fromkeys("wavg", 8))
    # of another type than in training, so that no weight on the device is that of the file
    weights = {name: x.float() for name, x in initial_weights(model_config, 0).items()}
    write_weights(folder / "base.pth", weights)
    (folder / "data.jsonl").write_text((json.dumps({"text": "words " * 9}) + "\n") * 4)
    config = TrainConfig(
        load_model=str(folder / "base.pth"),
        data_file=str(folder / "data.jsonl"),
        ctx_len=16,
        micro_bsz=1,
        precision="bf16",
        accelerator="cpu",
        merge=0,
        devices=RANKS,
        strategy="fsdp",
    )
    configs = {n: replace(config, proj_dir=str(folder / "runs" / n), **CASES[n]) for n in names}
    run_ranks(take_rank, RANKS, configs, folder)
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    return {n: Measured(*x) for n, x in read.items()}, dict(read_weights(config.load_model))


def held_at_once(weights: Mapping[str, Tensor], quant: str) -> tuple[int, int]:
    """Bytes of all blocks as they are stored, and of a part, one block and what stays whole."""
    numbers, scales, rest = 0.0, 0.0, 0.0
    for name, x in weights.items():
        if not name.startswith("blocks."):
            rest += 2 * x.numel()
        elif quant == "none" or min(x.shape) < WIDTH:
            numbers += 2 * x.numel()
        elif quant == "nf4":
            numbers, scales = numbers + x.numel() / 2, scales + x.numel() / 64 * 4
        else:
            numbers, scales = numbers + x.numel(), scales + 4 * len(x)
    blocks = numbers + scales
    # scales are on each device
    return int(blocks), int(numbers / RANKS + scales + blocks / LAYERS + rest)


def test_a_device_never_holds_more_of_a_base_than_its_part_and_a_block(tmp_path: Path) -> None:
    require_parts(FAST, tmp_path)


@pytest.mark.slow
def test_nor_does_it_where_a_method_looks_at_the_weights_first(tmp_path: Path) -> None:
    require_parts([name for name in CASES if name not in FAST], tmp_path)


def require_parts(names: Sequence[str], folder: Path) -> None:
    measured, weights = measure(folder, names)
    # the mapping of the file is counted too
    mapped = sum(x.nbytes for x in weights.values())
    # a method that decomposes or measures a weight has that in float32, as saving has
    wide = 4 * 4 * max(x.numel() for n, x in weights.items() if n.startswith("blocks."))
    for name, found in measured.items():
        quant = CASES[name].get("quant", "none")
        blocks, held = held_at_once(weights, quant)
        loose = 8 * found.trained + (wide if name in READING else 0)
        assert found.loading - mapped < held + loose, name
        # so that a base which is whole beside its parts would be seen
        assert loose < blocks - blocks / LAYERS
        if quant == "none":
            assert found.saving < 2 * blocks / LAYERS + wide + 8 * found.trained < blocks, name
