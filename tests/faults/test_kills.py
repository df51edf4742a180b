"""SIGKILL at random moments: the run goes on each time, and ends as one that was never killed.

Each run is a process of its own that kills itself, at a random time or before a random one of its
operations on files: in training, in saving, in merging, in evaluating and in preparing data.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft.config import TrainConfig
from tests.training.test_resume import assert_same

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
OPERATIONS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open", "truncate")


def run_until_killed(config: TrainConfig, operation: int, seconds: float, answers: Any) -> None:
    """Trains, and dies before the file operation of this number, or after so many seconds."""
    from rwkv_peft.training import samples
    from rwkv_peft.training.run import train

    samples.NUM_TOKENS = 6
    count = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    if seconds:
        killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        killer.daemon = True
        killer.start()
    started = time.monotonic()
    result = train(config)
    answers.put((result.steps, count, time.monotonic() - started))


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Evaluations and samples, without what is measured."""
    names = ("val_data.jsonl", "val_samples.jsonl")
    lines = [x for name in names for x in (folder / name).read_text().splitlines()]
    return [{**json.loads(line), "t_cost": 0} for line in lines]


class Campaign:
    """Runs in processes that a server forks, so that libraries are imported once."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["rwkv_peft.training.run", "peft", "yaml", "rich", "tests.training.test_resume"]
        )

    def run(self, config: TrainConfig, operation: int = 0, seconds: float = 0.0) -> Any:
        """Steps, file operations and seconds of a run that ended, None if it was killed."""
        answers = self._context.SimpleQueue()
        process = self._context.Process(
            target=run_until_killed, args=(config, operation, seconds, answers)
        )
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        return None if process.exitcode else answers.get()


@pytest.mark.parametrize(
    "kills", [4, pytest.param(50, marks=pytest.mark.slow)], ids=lambda x: f"{x} kills"
)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(
    kills: int,
    make_model_file: Callable[..., Path],
    make_data_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    sizes = {"n_layer": 1, "n_embd": 64, "dim_att": 64, "dim_ffn": 128}
    (tmp_path / "prompts.txt").write_text("row 3:\n")
    held_out = make_data_file([f"row {i}: few words" for i in range(3)], name="held.jsonl")
    config = TrainConfig(
        load_model=str(make_model_file(**sizes)),
        data_file=str(make_data_file([f"row {i}: " + "words " * (1 + i % 3) for i in range(12)])),
        data_cache=str(tmp_path / "cache"),
        proj_dir=str(tmp_path / "whole"),
        peft="lora",
        peft_config={"r": 4, "lora_dropout": 0.1},
        dataload="pad",
        ctx_len=32,
        micro_bsz=2,
        epoch_count=2,
        lr_init=1e-2,
        precision="fp32",
        accelerator="cpu",
        random_seed=3,
        save_every_steps=2,
        val_file=str(held_out),
        val_every_steps=3,
        val_prompts=str(tmp_path / "prompts.txt"),
    )
    campaign, rng, killed, number = Campaign(), random.Random(0), 0, 0
    steps, operations, seconds = campaign.run(config)
    assert steps == 12
    while killed < kills:
        number += 1
        config = replace(config, proj_dir=str(tmp_path / f"run {number}"), resume="auto")
        done = None
        while done is None:
            # once there were enough, to the end
            by_time = killed % 3 == 2
            place = 0 if by_time or killed >= kills else rng.randrange(1, operations)
            moment = rng.uniform(0, seconds) if by_time and killed < kills else 0.0
            done = campaign.run(config, place, moment)
            killed += done is None
        assert done[0] == steps
        assert_same(Path(config.proj_dir), tmp_path / "whole")
        assert evaluations(Path(config.proj_dir)) == evaluations(tmp_path / "whole")
