"""`rwkv-peft data prepare in.jsonl --output out`: a binidx pair that training maps into memory."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_peft.cli.legacy.data import translate_prepare
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import DataConfig, DataType, Switch
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_line


@dataclass(frozen=True, slots=True)
class PrepareOptions(DataConfig):
    """What to read, and the pair to write."""

    output: str = ""
    """The pair to write, without .bin and .idx; the input's name if empty."""
    overwrite: Switch = 0
    """1 replaces what has this name, if it is nothing that is read."""
    data_type: DataType = "auto"
    """binidx is what is written; any other names the format of the input."""
    prepare_workers: int = 0
    """Processes that tokenise; 0: one a core."""
    vocab_size: int = 65536
    """Vocabulary of the model."""
    vocab_file: str = ""
    """Another vocabulary in the format of rwkv_vocab_v20230424.txt."""
    copies: int = 1
    """How many times every document is written, each copy in a new order if above 1."""
    ctx_len: int = 0
    """Prints RWKV-LM's magic_prime for this length."""
    random_seed: int = 0
    """Seed of the orders."""


def run(args: Sequence[str]) -> int:
    """Tokenises a file, checks that every document decodes to its text again, writes the pair."""
    arguments = translate_prepare(args)
    options = parse(PrepareOptions, arguments, command="data prepare", positional=("data_file",))
    if not options.data_file:
        raise ConfigError("no data given: rwkv-peft data prepare in.jsonl --output out")
    if options.loss_mask not in ("auto", "none", "pad"):
        raise ConfigError(
            f"--loss_mask {options.loss_mask}: a binidx pair holds no masks; give the mask to train"
        )
    if options.copies < 1 or options.ctx_len < 0:
        raise ConfigError("--copies must be above 0, and --ctx_len not below it")
    output = Path(options.output or Path(options.data_file).name.partition(".")[0])

    from rwkv_peft.data.pairs import write_pair
    from rwkv_peft.data.prepare import read_documents
    from rwkv_peft.data.sources import find_sources
    from rwkv_peft.data.tokenizer import Tokenizer
    from rwkv_peft.guard import require_free

    inputs = [file for source in find_sources(options.data_file) for file in source.files]
    inputs += [Path(name) for name in (options.vocab_file, options.template) if name]
    for ending in (".bin", ".idx"):
        name = f"{output}{ending}"
        require_free(name, inputs=inputs, overwrite=bool(options.overwrite))
    vocab_file = Path(options.vocab_file) if options.vocab_file else None
    tokenizer = Tokenizer(options.vocab_size, vocab_file=vocab_file)
    config = replace(
        options,
        data_type="auto" if options.data_type == "binidx" else options.data_type,
        loss_mask="none",
        prepare_workers=options.prepare_workers or os.cpu_count() or 1,
    )
    with _progress() as advance:
        documents = read_documents(config, tokenizer, progress=advance, is_checked=True)
    if documents.weights is not None:
        raise ConfigError(
            f"{options.data_file} has rows with weights, which a binidx pair cannot hold: train on "
            "the file itself"
        )
    for line in documents.report.describe(documents.paths):
        print_line(line, file=sys.stderr)
    num_tokens = write_pair(output, documents, options.copies, options.random_seed)
    print_line(
        f"wrote {output}.bin and {output}.idx: {len(documents) * options.copies:,} documents, "
        f"{num_tokens:,} tokens"
    )
    if options.ctx_len:
        print_line(
            f"magic_prime {magic_prime(num_tokens, options.ctx_len)} (my_exit_tokens {num_tokens})"
        )
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how much text was tokenised, and how fast."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeElapsedColumn, TransferSpeedColumn

    columns = ("tokenising", DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("", total=None)
        yield lambda num_bytes: shown.advance(task, num_bytes)


def magic_prime(num_tokens: int, ctx_len: int) -> int:
    """The largest prime of the form 3n + 2 below tokens / ctx_len - 1; 0 if there is none."""
    for candidate in range(num_tokens // ctx_len - 1, 4, -1):
        if candidate % 3 == 2 and all(candidate % d for d in range(2, math.isqrt(candidate) + 1)):
            return candidate
    return 0
