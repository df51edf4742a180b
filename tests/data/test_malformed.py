"""Generated broken files of every format: each ends with a clear message or a counted report."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenfiles import write_index
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError

TOKENIZER = Tokenizer()
NUM_QUICK, NUM_FULL = 60, 1000
# opening each through Hugging Face datasets takes a while
NUM_QUICK_DATASETS = 8
VALUES: list[Any] = [
    None, True, 0, -1, 1e400, float("nan"), 10**30, "", " ", "a", "\ud800", "\0", "User:", [], {},
    [[]], [None], [{}], {"a": {}}, [{"role": "user"}], [{"role": 1, "content": 2}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b", {"text": 1}]}],
    [{"from": "human", "value": None}], [{"role": "x", "content": "y"}], "字" * 200,
    [{"role": "assistant", "tool_calls": 5, "weight": "x", "thinking": {}}],
]  # fmt: skip
KEYS = [
    "text", "messages", "conversations", "instruction", "input", "output", "prompt", "completion",
    "history", "system", "tools", "weight", "state", "", "字",
]  # fmt: skip
GOOD = [
    {"text": "User: a\n\nAssistant: 你好。"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"instruction": "a", "output": "b", "weight": 0.5},
]


def random_row(rng: random.Random) -> Any:
    if rng.random() < 0.4:
        return rng.choice(GOOD)
    row = {rng.choice(KEYS): rng.choice(VALUES) for _ in range(rng.randrange(5))}
    return {**rng.choice(GOOD), **row} if rng.random() < 0.5 else row


def spoiled(raw: bytes, rng: random.Random) -> bytes:
    """Bytes cut, changed, doubled or replaced somewhere."""
    for _ in range(rng.randrange(4)):
        i, j = sorted(rng.choices(range(len(raw) + 1), k=2))
        j = min(j, i + rng.randrange(1, 40))
        change = rng.randrange(5)
        if change == 0:
            raw = raw[:i] + rng.randbytes(rng.randrange(8)) + raw[j:]
        elif change == 1:
            raw = raw[:i]
        elif change == 2:
            raw = raw[:i] + raw[i:j] * 2 + raw[j:]
        elif change == 3:
            raw = raw[:i] + rng.choice([b"\n", b"\r\n", b'"', b"[", b"{", b"\0", b"\xff"]) + raw[i:]
        else:
            raw = raw[j:]
    return raw


def rows_of_text(rng: random.Random) -> list[dict[str, str]]:
    return [{"text": rng.choice(["a", "二。", "", 'x"y', "c,d\ne"])} for _ in range(4)]


def jsonl(path: Path, rng: random.Random) -> Path:
    lines = [json.dumps(random_row(rng)).encode() for _ in range(rng.randrange(1, 8))]
    path = path.with_suffix(".jsonl")
    path.write_bytes(spoiled(rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines), rng))
    return path


def array(path: Path, rng: random.Random) -> Path:
    raw = json.dumps([random_row(rng) for _ in range(5)], indent=rng.choice([None, 1])).encode()
    path = path.with_suffix(".json")
    path.write_bytes(spoiled(raw, rng))
    return path


def table(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(rng.choice([".csv", ".tsv"]))
    text = "text,weight\n" + "".join(f'"{row["text"]}",1\n' for row in rows_of_text(rng))
    path.write_bytes(spoiled(text.encode(), rng))
    return path


def plain(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(".txt")
    path.write_bytes(spoiled("User: 你好。\n\nAssistant: a".encode(), rng))
    return path


def pair(path: Path, rng: random.Random) -> Path:
    dtype = np.dtype(rng.choice(["<u2", "<i4"]))
    sizes = np.array([rng.randrange(4) for _ in range(5)])
    tokens = np.array([rng.choice([0, 11, 59, 65000]) for _ in range(sizes.sum())], dtype=dtype)
    write_spoiled_index = rng.random() < 0.7
    with open(f"{path}.idx", "wb") as file:
        write_index(file, sizes, dtype)
    if write_spoiled_index:
        raw = Path(f"{path}.idx").read_bytes()
        Path(f"{path}.idx").write_bytes(spoiled(raw, rng))
    Path(f"{path}.bin").write_bytes(spoiled(tokens.tobytes(), rng))
    return path


def numpy(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(".npy")
    np.save(path, np.array([11, 0, 59, 65535, 0], dtype=rng.choice(["u2", "i4", "i8", "f4"])))
    path.write_bytes(spoiled(path.read_bytes(), rng))
    return path


def uint16(path: Path, rng: random.Random) -> Path:
    path.write_bytes(rng.randbytes(rng.randrange(40)))
    return path


def parquet(path: Path, rng: random.Random) -> Path:
    from datasets import Dataset

    path = path.with_suffix(".parquet")
    Dataset.from_list(rows_of_text(rng)).to_parquet(str(path))
    path.write_bytes(spoiled(path.read_bytes(), rng))
    return path


def arrow(path: Path, rng: random.Random) -> Path:
    import pyarrow as pa

    path = path.with_suffix(".arrow")
    held = pa.Table.from_pylist(rows_of_text(rng))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, held.schema) as writer:
        writer.write_table(held)
    path.write_bytes(spoiled(path.read_bytes(), rng))
    return path


FORMATS = (jsonl, array, table, plain, pair, numpy, uint16, parquet, arrow)


def check(make: Callable[[Path, random.Random], Path], folder: Path, seed: int) -> str:
    """Makes a broken file and reads it; what came of it."""
    rng = random.Random(seed)
    path = make(folder / f"{seed}", rng)
    data_type = "uint16" if make is uint16 else "auto"
    mask = rng.choice(["auto", "qa", "none"])
    settings = {"data_type": data_type, "loss_mask": mask, "max_untrained": 1.0}
    settings["on_bad_row"] = rng.choice(["stop", "skip"])
    settings["data_cache"] = str(folder)
    try:
        documents = read_documents(DataConfig(data_file=str(path), **settings), TOKENIZER)
    except (DataError, ConfigError) as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1500, message
        return "refused"
    report = documents.report
    # every row is a document or in a list of what was left out
    lists = (report.bad, report.empty, report.untrained)
    assert report.num_rows == len(documents) + sum(map(len, lists)) or not report.num_bytes
    assert len(documents) > 0 and documents.starts[-1] == len(documents.tokens)
    assert documents.weights is None or np.isfinite(documents.weights).all()
    assert not (report.bad and settings["on_bad_row"] == "stop")
    return "read"


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_broken_file_is_refused_in_one_line_or_read_with_every_row_counted(
    make: Callable[[Path, random.Random], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _keep_datasets_here(tmp_path, monkeypatch)
    count = NUM_QUICK_DATASETS if make in (parquet, arrow) else NUM_QUICK
    results = [check(make, tmp_path, seed) for seed in range(count)]
    assert {"refused", "read"} == set(results)


@pytest.mark.slow
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_thousand_broken_files_of_each_format(
    make: Callable[[Path, random.Random], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _keep_datasets_here(tmp_path, monkeypatch)
    results = [check(make, tmp_path, 10_000 + seed) for seed in range(NUM_FULL)]
    assert {"refused", "read"} == set(results)


def _keep_datasets_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    os.makedirs(folder / "datasets", exist_ok=True)
