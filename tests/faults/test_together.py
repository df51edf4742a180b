"""Runs that begin at the same moment: nothing is lost, and nothing of two runs is mixed."""

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rwkv_peft.checkpoint.adapter import read_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import RwkvPeftError


class Answer(NamedTuple):
    """What a run said at its end: its seed, and where its result lies, or why there is none."""

    seed: int
    folder: str
    error: str


class Values(NamedTuple):
    """What a run has learned, in plain values."""

    losses: list[float]
    merged: dict[str, list[Any]]
    adapter: dict[str, list[Any]]


def run_one(config: TrainConfig, folder: str, barrier: Any, answers: Any) -> None:
    """Trains in a folder when all others are ready."""
    from rwkv_peft.training.run import train

    os.chdir(folder)
    torch.set_num_threads(1)
    barrier.wait(120)
    try:
        result = train(config)
        answers.put(Answer(config.random_seed, str(result.proj_dir.absolute()), ""))
    except RwkvPeftError as error:
        answers.put(Answer(config.random_seed, "", str(error)))


def run_at_once(configs: Sequence[TrainConfig], folder: Path) -> list[Answer]:
    """Runs in processes that a server forks, so that libraries are imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rwkv_peft.training.run", "peft", "yaml", "rich"])
    folder.mkdir()
    barrier, answers = context.Barrier(len(configs)), context.SimpleQueue()
    given = str(folder), barrier, answers
    processes = [context.Process(target=run_one, args=(c, *given)) for c in configs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [answers.get() for _ in configs]


def values_of(folder: str) -> Values:
    lines = Path(folder, "loss_data.jsonl").read_text().splitlines()
    merged = read_weights(Path(folder, "rwkv-0.pth"))
    adapter = read_adapter(Path(folder, "rwkv-0-adapter")).tensors
    losses = [json.loads(line)["loss"] for line in lines]
    return Values(losses, *({n: x.tolist() for n, x in m.items()} for m in (merged, adapter)))


@pytest.mark.parametrize(
    ("pairs", "proj_dir"),
    [
        (2, ""),
        *(pytest.param(50, name, marks=pytest.mark.slow) for name in ("", "mine", "new/inner")),
    ],
)
def test_pairs_of_runs_lose_and_mix_nothing(
    pairs: int,
    proj_dir: str,
    make_model_file: Callable[..., Path],
    make_data_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    sizes = {"n_layer": 1, "n_embd": 64, "dim_att": 64, "dim_ffn": 128}
    config = TrainConfig(
        load_model=str(make_model_file(**sizes)),
        data_file=str(make_data_file([f"row {i}" for i in range(4)])),
        proj_dir=proj_dir,
        peft="lora",
        peft_config={"r": 2},
        dataload="pad",
        ctx_len=16,
        micro_bsz=2,
        epoch_count=1,
        precision="fp32",
        accelerator="cpu",
    )
    both = [replace(config, random_seed=seed) for seed in (1, 2)]
    alone = {}
    for one in both:
        (answer,) = run_at_once([one], tmp_path / f"alone {one.random_seed}")
        alone[one.random_seed] = values_of(answer.folder)
    assert alone[1] != alone[2]
    for pair in range(pairs):
        folder = tmp_path / f"pair {pair}"
        answers = run_at_once(both, folder)
        done = [answer for answer in answers if answer.folder]
        refused = [answer.error for answer in answers if answer.error]
        if proj_dir:
            # the other is there at the same time, or has ended before
            assert len(done) == len(refused) == 1, answers
            assert "is in use by" in refused[0] or "holds a run" in refused[0]
        else:
            assert sorted(Path(a.folder).name for a in done) == ["out", "out-2"], answers
        assert all(values_of(a.folder) == alone[a.seed] for a in done), pair
        assert not [x for x in folder.rglob(".*")]
