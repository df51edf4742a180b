"""Tests that run in processes of their own: several ranks, and Triton's interpreter."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(take_rank: Callable[..., None], count: int, *args: Any) -> None:
    """Calls a function with its rank, a port and more in so many processes, which must end well."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    given = store.port, *args
    ranks = [context.Process(target=take_rank, args=(rank, *given)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(400)
        if rank.is_alive():
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * count


def become_rank(rank: int, count: int, port: int, number: int) -> None:
    """Has this process be one of so many in their run of this number."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(number),
    }


def run_interpreted(path: Path) -> None:
    """Runs the tests of a file with Triton's interpreter, chosen when Triton is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
