"""A rank that is lost ends the others, which would wait for it without end."""

import subprocess
import sys
import time
from typing import Any

import pytest
from torch.distributed import TCPStore

from rwkv_peft.parallel.watch import LOST_CODE

# two ranks that watch each other; what they do is the last line
RANK = """
import sys, time
from torch.distributed import TCPStore
from rwkv_peft.parallel import watch as watching
watching.INTERVAL, watching.PATIENCE = 0.1, 1.0
rank, port = int(sys.argv[1]), int(sys.argv[2])
connect = lambda: TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
watch = watching.Watch(connect, rank, 2)
print("watching", flush=True)
"""
WAITS, ENDS = "time.sleep(60)", "sys.stdin.read(); watch.close()"
FAILS = "watch.fail('it ended with an error')"


@pytest.fixture
def store() -> Any:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(store: Any, rank: int, does: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", RANK + does, str(rank), str(store.port)]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_a_rank_without_a_sign_of_life_ends_the_other_with_one_line(store: Any) -> None:
    ranks = [start(store, rank, WAITS) for rank in range(2)]
    for rank in ranks:
        assert rank.stdout and rank.stdout.readline() == "watching\n"
    ranks[1].kill()
    _, error = ranks[0].communicate(timeout=30)
    assert ranks[0].returncode == LOST_CODE
    (line,) = error.splitlines()
    assert "rank 1 gave no sign of life" in line and "--resume auto" in line
    ranks[1].communicate()


def test_a_rank_that_has_ended_is_not_missed_and_one_that_fails_says_so(store: Any) -> None:
    waiting, ending = start(store, 0, WAITS), start(store, 1, ENDS)
    for rank in (waiting, ending):
        assert rank.stdout and rank.stdout.readline() == "watching\n"
    ending.communicate(timeout=30)
    time.sleep(2)
    assert (ending.returncode, waiting.poll()) == (0, None)
    failing = start(store, 1, FAILS)
    failing.communicate(timeout=30)
    _, error = waiting.communicate(timeout=30)
    assert waiting.returncode == LOST_CODE
    assert "rank 1: it ended with an error" in error
