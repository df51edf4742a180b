"""Starting the processes of a run on several devices of this machine, and ending them together."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import IO

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import TrainingError
from rwkv_peft.language import chosen_language
from rwkv_peft.parallel.watch import LOST_CODE, PATIENCE
from rwkv_peft.parallel.world import HELD, OWN, VARIABLES, find_world
from rwkv_peft.printing import print_text
from rwkv_peft.training.interrupt import SIGNALS

# seconds between two looks at the processes; for the others to end by themselves when one has
# failed; and after the first has ended well
INTERVAL, GRACE, LAST_GRACE = 0.2, 5.0, 60.0
# bytes of what a rank beside the first said last
TOLD = 4000


def must_start(config: TrainConfig) -> bool:
    """Whether a run needs processes that nobody has started, all of them on this machine."""
    return config.devices > 1 and config.num_nodes == 1 and find_world(config) is None


def is_first_rank(config: TrainConfig) -> bool:
    """Whether this process speaks for a run."""
    world = find_world(config)
    return world is None or world.rank == 0


def start_ranks(arguments: Sequence[str], config: TrainConfig) -> int:
    """Runs a command line once for each device, and gives the exit code of the first.

    The first has the terminal; of the others it is told what they said if one of them failed.
    Signals go to the first, which stops all.

    Raises:
        TrainingError: a rank was lost.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from rwkv_peft.parallel.strategy import require_devices, require_strategy

    require_strategy(config.strategy, config.devices)
    require_devices(config, config.devices)
    # held here, so that no port is chosen that another program may take first
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        told = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(config.devices)]
        ranks = [
            stack.enter_context(_started(arguments, rank, config.devices, store.port, told[rank]))
            for rank in range(config.devices)
        ]
        with _forwarded(ranks[0]):
            failed = _wait(ranks)
        code = ranks[0].poll()
        # the first has said nothing where it was lost itself, or ended by what it cannot hear
        is_silent = code in (None, LOST_CODE) or (code < 0 and -code not in SIGNALS)
        if failed is None or not is_silent:
            return 0 if code is None else code if code >= 0 else 128 - code
        raise TrainingError(_describe(failed, ranks[failed], told[failed], config))


@contextmanager
def _started(
    arguments: Sequence[str], rank: int, count: int, port: int, told: IO[bytes]
) -> "Iterator[subprocess.Popen[bytes]]":
    values = (rank, rank, count, count, "127.0.0.1", port)
    environment = {
        # each works with its share of the processor
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        **{name: str(value) for name, value in zip(VARIABLES, values, strict=True)},
        HELD: "True",
        OWN: "1",
    }
    # what the others said is translated where it is told
    language = "en" if rank else chosen_language()
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_peft.cli.main", "--lang", language, "train", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=told if rank else None,
        stderr=told if rank else None,
        # Ctrl-C reaches it through this process alone, so that one is not taken for two
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _forwarded(first: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Hands signals on to the first rank, which ends all with what they have learned."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            first.send_signal(number)

    before = {n: signal.getsignal(n) for n in SIGNALS}
    heard = [n for n, handler in before.items() if handler != signal.SIG_IGN]
    try:
        for number in heard:
            signal.signal(number, hand_on)
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _wait(ranks: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Waits for the end of all; gives the rank that failed or stopped, None if none did."""
    failed, until = None, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        time.sleep(INTERVAL)
        codes = [rank.poll() for rank in ranks]
        if failed is None:
            # a signal may have ended the others while the first still writes; those that only lost
            # another come last, before them those that a library aborted for it
            wrong = [i for i, code in enumerate(codes) if code and (i == 0 or code < 128)]
            failed = max(wrong, key=lambda i: _weigh(codes[i]), default=None)
            if failed is not None:
                until = time.monotonic() + GRACE
            elif codes[0] == 0 and until == float("inf"):
                until = time.monotonic() + LAST_GRACE
    stopped = [i for i, rank in enumerate(ranks) if rank.poll() is None]
    if failed is not None and ranks[failed].poll() == LOST_CODE and stopped:
        # it has lost one that is still there, and works no more
        return stopped[0]
    return failed


def _weigh(code: int | None) -> int:
    """How much an exit code says of why a run has ended."""
    return {LOST_CODE: 0, -signal.SIGABRT: 1}.get(code or 0, 2)


def _describe(
    rank: int, process: "subprocess.Popen[bytes]", told: IO[bytes], config: TrainConfig
) -> str:
    code = process.returncode
    how = f"ended with code {code}"
    if code is None:
        how = f"gave no sign of life for {PATIENCE:.0f} s"
    elif code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
    told.seek(0, os.SEEK_END)
    told.seek(max(0, told.tell() - TOLD))
    words = told.read().decode(errors="replace").strip()
    if code == 2 and words:
        return f"rank {rank}: {words.splitlines()[-1].removeprefix('error: ')}"
    if words:
        print_text(f"rank {rank} said:\n{words}", file=sys.stderr)
    folder = f" --proj_dir {config.proj_dir}" if config.proj_dir else " and the run's --proj_dir"
    return (
        f"rank {rank} of {config.devices} on {socket.gethostname()} {how}, and with it the run "
        f"ended on all: --resume auto{folder} goes on from its last checkpoint, if it makes any "
        "(--save_every_steps)"
    )
