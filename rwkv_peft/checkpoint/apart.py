"""Merging in a process of its own, so that a run goes on meanwhile.

A merge attaches an adapter, which draws at random, sets the number of threads and may take warnings
away: all that is of the whole process, in which a run is training. The process reads files and
writes files. It ends when the one that has started it does, whatever ended that.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from rwkv_peft.checkpoint.merge import merge
from rwkv_peft.checkpoint.report import MergeReport
from rwkv_peft.deferred import defer_transformers
from rwkv_peft.errors import CheckpointError, RwkvPeftError
from rwkv_peft.printing import print_json

PACKAGE = Path(__file__).parents[1]


def merge_apart(
    base_model: str | Path, adapter: str | Path, output: str | Path, **options: Any
) -> MergeReport:
    """What `merge` does with these arguments, by another process.

    Raises:
        CheckpointError: `merge` raised an error, or the process was ended.
    """
    if not sys.executable:
        # a program that has Python inside it
        return merge(base_model, adapter, output, **options)
    given = [str(base_model), str(adapter), str(output), options, torch.get_num_threads()]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(given)],
            # nothing is ever written to it: it closes when this process ends
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # the working directory is not where packages are imported from
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            # Ctrl-C on a terminal is for the run alone, which waits for its files
            start_new_session=True,
        )
        with process:
            assert process.stdout is not None
            said = process.stdout.read()
        errors.seek(0)
        trace = errors.read().decode(errors="replace").strip()
    try:
        answer = json.loads(said)
    except ValueError as error:
        reason = trace.splitlines()[-1] if trace else f"exit code {process.returncode}"
        raise CheckpointError(
            f"{adapter} could not be merged ({reason}): rwkv-peft merge --base_model {base_model} "
            f"--adapter {adapter} --output {output}"
        ) from error
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return MergeReport(**answer)


def main() -> None:
    """Merges by the arguments of the command line, and prints the report or the error as JSON."""
    *files, options, threads = json.loads(sys.argv[1])
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        with defer_transformers():
            answer = asdict(merge(*files, **options))
    except RwkvPeftError as error:
        answer = {"error": str(error)}
    print_json(answer)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
