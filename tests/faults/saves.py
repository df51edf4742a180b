"""Each kind of save, as a function that writes a version and one that reads what is there."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import read_adapter
from rwkv_peft.checkpoint.convert import convert
from rwkv_peft.checkpoint.folder import write_folder
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.checkpoint.state import read_state, write_state
from rwkv_peft.checkpoint.stream import as_bytes
from rwkv_peft.checkpoint.tree import FILES, find_damage, read_tree, write_tree
from rwkv_peft.cli.main import main
from rwkv_peft.config import DataConfig
from rwkv_peft.data import prepare
from rwkv_peft.data.pairs import write_pair
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.exports.formats import FORMATS
from rwkv_peft.models.initial import initial_weights
from rwkv_peft.ops.cuda.cache import cached
from rwkv_peft.writing import atomic_folder
from tests.checkpoint.test_merge import make_adapter
from tests.conftest import make_model_config
from tests.faults.test_pairs import NEW, OLD, documents_of

CONFIG = make_model_config(n_layer=1, n_embd=64, dim_att=64, dim_ffn=64, vocab_size=320)
TOKENIZER = Tokenizer()


class Kind(NamedTuple):
    """A way to save.

    Attributes:
        save: writes version 0 or 1 into a folder, over what is there.
        read: what a reader finds in that folder.
        is_needed: whether a save that does not succeed is an error.
    """

    save: Callable[[Path, Path, int], object]
    read: Callable[[Path, Path], object]
    is_needed: bool = True


def make_inputs(given: Path) -> None:
    """Two models, two adapters of each kind that is used, and two files of data."""
    for version in (0, 1):
        weights = {n: x.float() for n, x in initial_weights(CONFIG, version).items()}
        write_weights(given / f"{version}.pth", weights)
        base = given / "0.pth"
        lora = given / f"lora{version}"
        make_adapter(base, lora, "lora", {"r": 2}, size=0.05 * (1 + version))
        pissa = {"r": 2, "init_lora_weights": "pissa"}
        make_adapter(base, given / f"pissa{version}", "lora", pissa, size=0.01 * (1 + version))
        rows = [{"text": f"{version} row {i}"} for i in range(20)]
        (given / f"{version}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _values(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {n: hashlib.sha256(as_bytes(x)).digest() for n, x in tensors.items()}


def _weights(ending: str) -> Kind:
    def save(given: Path, folder: Path, version: int) -> None:
        tensors = {f"blocks.{i}.att.r_k": torch.full((i + 1, 64), 1.0 + version) for i in range(2)}
        write_weights(folder / f"w{ending}", tensors)

    return Kind(save, lambda given, folder: _values(read_weights(folder / f"w{ending}")))


def _save_state(given: Path, folder: Path, version: int) -> None:
    shape = CONFIG.n_head, CONFIG.head_size, CONFIG.head_size
    write_state(folder / "s.pth", {"blocks.0.att.time_state": torch.full(shape, 1.0 + version)})


def _save_adapter(given: Path, folder: Path, version: int) -> None:
    write_folder(folder / "a", read_adapter(given / f"lora{version}"), "base.pth")


def _read_adapter(name: str) -> Callable[[Path, Path], object]:
    return lambda given, folder: _values(read_adapter(folder / name).tensors)


def _merge(given: Path, folder: Path, version: int) -> None:
    lora, output = given / f"lora{version}", folder / "m.pth"
    rwkv_peft.merge(given / "0.pth", lora, output, overwrite=True, compare=0)


def _read_merged(given: Path, folder: Path) -> object:
    report = folder / "merge_report.json"
    if report.exists():
        json.loads(report.read_text())
    return _values(read_weights(folder / "m.pth"))


def _convert(given: Path, folder: Path, version: int) -> None:
    source = given / f"pissa{version}"
    convert(source, folder / "r", given / "0.pth", to="residual", overwrite=True)


def _save_tree(given: Path, folder: Path, version: int) -> None:
    tree = {"a": [1, {"b": torch.full((100,), float(version))}], "version": version}
    with atomic_folder(folder / "step-000001") as new:
        write_tree(new, tree)


def _read_tree(given: Path, folder: Path) -> object:
    found = folder / "step-000001"
    assert not find_damage(found) and sorted(os.listdir(found)) == sorted(FILES)
    return read_tree(found)["version"]


def _read_pair(given: Path, folder: Path) -> object:
    config = DataConfig(data_file=str(folder / "t"), data_type="binidx")
    found = read_documents(config, TOKENIZER)
    return [x.tolist() for x in np.split(found.tokens, found.starts[1:-1])]


def _cache(given: Path, folder: Path, version: int) -> list[int]:
    before, prepare.CACHED_FROM = prepare.CACHED_FROM, 0
    try:
        config = DataConfig(data_file=str(given / "1.jsonl"), data_cache=str(folder / "cache"))
        tokens: list[int] = read_documents(config, TOKENIZER).tokens.tolist()
        return tokens
    finally:
        prepare.CACHED_FROM = before


def _kernel(given: Path, folder: Path, version: int) -> bytes:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return cached("key", lambda: b"made")


def _command(*line: str) -> Callable[[Path, Path, int], object]:
    """A command line, with {given}, {out} and {version}; it tells its errors itself."""

    def save(given: Path, folder: Path, version: int) -> None:
        words = [w.format(given=given, out=folder, version=version) for w in line]
        if code := main(words):
            # as a shell sees it
            raise SystemExit(code)

    return save


def _init(given: Path, folder: Path, version: int) -> None:
    sizes = ["--n_layer", "1", "--n_embd", "64", "--vocab_size", "300"]
    line = ["init", "{out}/i.safetensors", *sizes, "--random_seed", "{version}", "--overwrite", "1"]
    _command(*line)(given, folder, version)


def _export(to: str, name: str) -> Kind:
    line = ("export", "{given}/{version}.pth", "--to", to, "--overwrite", "1")
    read = FORMATS[to].read
    return Kind(
        _command(*line, "--output", f"{{out}}/{name}"),
        lambda given, folder: _values({n: x.whole() for n, x in read(folder / name).items()}),
    )


KINDS: dict[str, Kind] = {
    "weights as .pth": _weights(".pth"),
    "weights as .safetensors": _weights(".safetensors"),
    "state": Kind(_save_state, lambda given, f: _values(read_state(f / "s.pth", CONFIG))),
    "adapter": Kind(_save_adapter, _read_adapter("a")),
    "merge": Kind(_merge, _read_merged),
    "residual": Kind(_convert, _read_adapter("r/adapter")),
    "checkpoint": Kind(_save_tree, _read_tree),
    "pair": Kind(
        lambda given, folder, v: write_pair(folder / "t", documents_of(NEW if v else OLD)),
        _read_pair,
    ),
    "data prepare": Kind(
        _command(
            *("data", "prepare", "{given}/{version}.jsonl", "--output", "{out}/t"),
            *("--overwrite", "1", "--prepare_workers", "1"),
        ),
        _read_pair,
    ),
    "init": Kind(_init, lambda given, f: _values(read_weights(f / "i.safetensors"))),
    "export of a file": _export("gguf", "e.gguf"),
    "export of a folder": _export("hf", "e"),
    "cache": Kind(_cache, lambda given, f: _cache(given, f, 1)),
    "kernels": Kind(_kernel, lambda given, f: _kernel(given, f, 1), is_needed=False),
}


def describe(value: object) -> Any:
    """Something short that differs when a value does."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
