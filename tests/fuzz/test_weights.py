"""Files of weights that are damaged, or made to harm: one line, or a file as it was.

`pytest -m slow tests/fuzz` takes 5,000 of each kind.
"""

import importlib
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.checkpoint.older import LegacyAdapterHints, read_old_adapter
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights, write_weights
from rwkv_peft.checkpoint.records import require_sums
from rwkv_peft.checkpoint.state import read_state
from rwkv_peft.cli.inspect import describe
from rwkv_peft.errors import RwkvPeftError
from rwkv_peft.models import build
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.initial import initial_weights
from tests.conftest import make_model_config
from tests.fuzz.mutate import (
    Mutator,
    alter_header,
    damage_record,
    mutate_bytes,
    mutate_directory,
    mutate_header,
    mutate_table,
    resize_record,
    truncate,
)

SECONDS = 10
# more than any of these files needs, less than what hostile sizes ask for
MEMORY = 2 << 30
CONFIG = make_model_config(
    n_embd=64, dim_att=64, dim_ffn=64, vocab_size=16, ranks=dict.fromkeys("wavg", 4)
)
# what each kind of damage may end in: a file that is refused, one that is as it was, or any
REFUSED, SAME, ANY = "refused", "same", "any"
PTH: dict[Mutator, str] = {
    mutate_bytes: SAME,
    truncate: REFUSED,
    mutate_directory: SAME,
    damage_record: REFUSED,
    resize_record: REFUSED,
    # without a checksum, or with one that is right: any numbers in a file that is in order
    mutate_table: ANY,
}
SAFETENSORS: dict[Mutator, str] = {
    mutate_bytes: ANY,
    truncate: REFUSED,
    mutate_header: ANY,
    alter_header: ANY,
}
CASES = [
    *(("model.pth", *case) for case in PTH.items()),
    *(("model.safetensors", *case) for case in SAFETENSORS.items()),
    *(
        (f"{kind}.pth", m, PTH[m])
        for kind in ("state", "adapter")
        for m in (mutate_bytes, mutate_table)
    ),
    ("state.safetensors", alter_header, ANY),
    ("old.pth", mutate_bytes, ANY),
    ("old.pth", truncate, REFUSED),
]


class HangError(BaseException):
    """A file took too long; no handler of errors takes it for one."""


@contextmanager
def limits() -> Iterator[None]:
    """Lets the process have little more memory than now."""
    # its first import takes seconds and hundreds of megabytes
    importlib.import_module("peft")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))

    def hang(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, hang)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def contents(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind in ("model", "old"):
        return {name: x.bfloat16() for name, x in initial_weights(CONFIG, 0).items()}
    if kind == "state":
        shape = CONFIG.n_head, CONFIG.head_size, CONFIG.head_size
        names = [f"blocks.{i}.att.time_state" for i in range(CONFIG.n_layer)]
        return {name: torch.randn(shape, generator=generator) for name in names}
    modules = [f"blocks.{i}.att.{leaf}" for i in range(2) for leaf in ("key", "value")]
    factors = [(f"{module}.lora_{leaf}", leaf) for module in modules for leaf in "AB"]
    shapes = {"A": (4, 64), "B": (64, 4)}
    return {name: torch.randn(shapes[leaf], generator=generator) for name, leaf in factors}


def write(path: Path) -> None:
    if path.stem == "old":
        torch.save(contents("old"), path, _use_new_zipfile_serialization=False)
    else:
        write_weights(path, contents(path.stem))


def use(path: Path, kind: str) -> dict[str, Tensor]:
    """All that commands do with such a file before they compute."""
    require_sums(path)
    if kind == "state":
        read_state(path, CONFIG)
    elif kind == "adapter":
        read_old_adapter(path, LegacyAdapterHints(8.0))
    else:
        weights = read_weights(path)
        own: ModelConfig = infer_model_config(weights)
        load_weights(build(own, op="reference"), weights)
    found = read_weights(path)
    # it reads a file several times, each time whole in this format
    if kind != "old":
        describe(path)
    return found


def find_failure(path: Path, kind: str, end: str, wanted: dict[str, Tensor]) -> str:
    """What a damaged file did that it must not; empty if nothing."""
    signal.alarm(SECONDS)
    try:
        found = use(path, kind)
    except RwkvPeftError as error:
        causes = [error, error.__cause__]
        # PyTorch reserves what an old file says, and fills no more than the file holds
        is_large = any(isinstance(c, MemoryError) or "allocate" in str(c) for c in causes)
        if is_large and kind != "old":
            return f"asks for too much memory: {error}"
        return "" if "\n" not in str(error) and len(str(error)) < 4000 else f"long: {error}"
    except HangError:
        return "hangs"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if end == REFUSED:
        return "was taken"
    is_same = list(found) == list(wanted) and all(
        found[n].dtype == x.dtype and torch.equal(found[n], x) for n, x in wanted.items()
    )
    return "" if end == ANY or is_same else "was taken for another file"


def require_held(
    folder: Path, name: str, mutator: Mutator, end: str, count: int, first: int
) -> None:
    path = folder / name
    write(path)
    data, wanted, failures = path.read_bytes(), contents(path.stem), []
    with limits():
        for seed in range(first, first + count):
            path.unlink()
            # a new file, as the last one may still be mapped
            path.write_bytes(mutator(data, random.Random(seed)))
            if path.read_bytes() != data and (
                failure := find_failure(path, path.stem, end, wanted)
            ):
                failures.append(f"seed {seed}: {failure}"[:300])
    assert not failures, f"{len(failures)} of {count}: " + "\n".join(failures[:10])


def ids(value: object) -> str:
    return value.__name__ if isinstance(value, Callable) else str(value)  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize(("name", "mutator", "end"), CASES, ids=ids)
def test_200_damaged_files_end_in_one_line(
    name: str, mutator: Mutator, end: str, tmp_path: Path
) -> None:
    require_held(tmp_path, name, mutator, end, 200, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutator", "end"), CASES, ids=ids)
def test_5000_damaged_files_end_in_one_line(
    name: str, mutator: Mutator, end: str, tmp_path: Path
) -> None:
    require_held(tmp_path, name, mutator, end, 5000, 1000)
