"""A run on several devices of which one rank is killed, and which then goes on.

    python benchmarks/lost_rank.py [--size 0.1b] [--strategy ddp] [--peft lora] [--ctx_len 256]
    python benchmarks/lost_rank.py --size bundled --ctx_len 64 --accelerator cpu   # without a GPU

Random weights, random bytes as text, a checkpoint every four steps. One run never stops. In another
the last rank is killed by SIGKILL in the middle; it is taken up again by `--resume auto`, and what
both have saved is compared.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_step import SIZES
from scaling import compare_files, make_files

STEPS, KILLED_AFTER, PATIENCE = 20, 10, 300


def count_steps(folder: Path) -> int:
    path = folder / "loss_data.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def find_ranks(parent: int) -> list[int]:
    """The processes that a command has started, in their order."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == parent:
            children.append(int(path.parent.name))
    return sorted(children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="0.1b", choices=list(SIZES))
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--peft", default="lora")
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = STEPS * args.devices * 2
        base = make_files(Path(name), args.size, rows, args.ctx_len)
        own = {
            **vars(args),
            "micro_bsz": 2,
            "epoch_steps": STEPS * args.devices,
            "epoch_count": 1,
            "random_seed": 0,
            "precision": "bf16",
            "compile": 0,
            "merge": 0,
            "save_every_steps": 4,
        }
        del own["size"]
        flags = [str(word) for name, value in own.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "rwkv_peft.cli.main", "train"]
        command += [base["load_model"], base["data_file"], *flags, "--proj_dir"]
        whole, broken = Path(name, "whole"), Path(name, "broken")
        subprocess.run([*command, str(whole)], check=True)
        run = subprocess.Popen([*command, str(broken)])
        until = time.monotonic() + PATIENCE
        while count_steps(broken) < KILLED_AFTER:
            if run.poll() is not None or time.monotonic() > until:
                raise SystemExit("the run did not come to be killed")
            time.sleep(0.05)
        killed = time.monotonic()
        os.kill(find_ranks(run.pid)[-1], signal.SIGKILL)
        code, seconds = run.wait(PATIENCE), time.monotonic() - killed
        print(f"killed after {count_steps(broken)} steps: ended in {seconds:.1f} s, code {code}")
        subprocess.run([*command, str(broken), "--resume", "auto"], check=True)
        print(f"files off by {compare_files(broken, whole):.1e} of their norm")


if __name__ == "__main__":
    main()
