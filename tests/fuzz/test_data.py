"""Files of rows and of tokens, damaged by chance, read as training reads them."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data import prepare
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.pairs import write_pair
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.templates import TEMPLATES
from rwkv_peft.data.tokenfiles import write_index
from rwkv_peft.data.tokenizer import Tokenizer
from tests.fuzz.damage import FULL, QUICK, run, spoil, spoil_value, to_json

TOKENIZER = Tokenizer()
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
ROWS: list[Any] = [
    {"text": "User: a\n\nAssistant: 你好。", "weight": 0.5, "state": "s"},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "weight": 0, "reasoning_content": "c"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ],
        "tools": [{"function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"prompt": "a", "completion": "b"},
    {"question": "a", "answer": "b"},
]
Make = Callable[[Path, random.Random], Path]


def jsonl(path: Path, rng: random.Random) -> Path:
    rows = [rng.choice(ROWS) for _ in range(3)]
    lines = [to_json(spoil_value(row, rng) if rng.random() < 0.6 else row) for row in rows]
    path = path.with_suffix(rng.choice([".jsonl", ".jsonl", ".json"]))
    raw = b"[%s]" % b",".join(lines) if path.suffix == ".json" else b"\n".join(lines)
    path.write_bytes(spoil(raw, rng))
    return path


def csv(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(rng.choice([".csv", ".tsv"]))
    path.write_bytes(spoil('question,answer\n"a","b\nc"\n"你",d\n,\n'.encode(), rng, at_least=1))
    return path


def parquet(path: Path, rng: random.Random) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = path.with_suffix(".parquet")
    texts: list[Any] = [{"text": "abc"}, {"text": "你好"}, {"text": None}]
    rows = rng.choice([texts, [{"text": [b"\xff", 1]}] if rng.random() < 0.1 else ROWS[1:2]])
    try:
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pq.write_table(pa.Table.from_pylist(texts), path)
    path.write_bytes(spoil(path.read_bytes(), rng))
    return path


def npy(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(".npy")
    kind = rng.choice(["u2", "u2", "i4", "i8", "f4", "O"])
    shape = rng.choice([(6,), (6,), (2, 3), (5, 0), (0,), (1, 2, 3), ()])
    tokens = np.full(shape, rng.choice([0, 11, 65535, 7]), dtype=kind)
    np.save(path, tokens, allow_pickle=True)
    path.write_bytes(spoil(path.read_bytes(), rng))
    return path


def binidx(path: Path, rng: random.Random) -> Path:
    dtype = np.dtype(rng.choice(["<u2", "<i4"]))
    sizes = np.array([rng.randrange(4) for _ in range(5)])
    tokens = np.array([rng.choice([0, 11, 59, 65000]) for _ in range(sizes.sum())], dtype=dtype)
    with open(f"{path}.idx", "wb") as file:
        write_index(file, sizes, dtype)
    raw = Path(f"{path}.idx").read_bytes()
    Path(f"{path}.idx").write_bytes(spoil(raw, rng))
    Path(f"{path}.bin").write_bytes(spoil(tokens.tobytes(), rng))
    return path


FORMATS = (jsonl, csv, parquet, npy, binidx)


@pytest.fixture(autouse=True)
def datasets_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    os.makedirs(tmp_path / "datasets", exist_ok=True)


def check(make: Make, folder: Path, seeds: range) -> set[str]:
    template = folder / "own.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    results = set()
    for seed in seeds:
        rng = random.Random(seed)
        path = make(folder / f"{seed}", rng)
        config = DataConfig(
            data_file=str(path),
            loss_mask=rng.choice(["auto", "qa", "none"]),
            template=rng.choice([*TEMPLATES, str(template)]),
            on_bad_row=rng.choice(["stop", "skip"]),
            max_untrained=1.0,
            data_cache=str(folder),
        )
        try:
            results.add(run(lambda c=config: _read(c)))  # type: ignore[misc]
        except BaseException as error:
            raise AssertionError(f"{make.__name__} of seed {seed}: {error!r}") from error
        for file in folder.glob(f"{seed}*"):
            file.unlink()
    return results


def _read(config: DataConfig) -> None:
    documents = read_documents(config, TOKENIZER)
    assert len(documents) > 0 and documents.starts[-1] == len(documents.tokens)
    assert (np.diff(documents.starts) > 0).all()
    assert documents.weights is None or np.isfinite(documents.weights).all()


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_damaged_file_is_refused_in_one_line_or_read(make: Make, tmp_path: Path) -> None:
    assert check(make, tmp_path, range(QUICK)) == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_thousands_of_damaged_files(make: Make, tmp_path: Path) -> None:
    assert check(make, tmp_path, range(10_000, 10_000 + FULL)) == {"read", "refused"}


def change_one_byte(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    kind = rng.randrange(3)
    i = rng.randrange(len(raw))
    if kind == 0:
        raw[i] ^= rng.randrange(1, 256)
    elif kind == 1:
        del raw[i:]
    else:
        raw[i:i] = rng.randbytes(rng.randrange(1, 9))
    path.write_bytes(raw)


def make_documents(folder: Path) -> DataConfig:
    path = folder / "data.jsonl"
    rows = [*ROWS, {"text": "words " * 30, "state": "t"}] * 3
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataConfig(data_file=str(path), data_cache=str(folder / "cache"))


def check_marked_pairs(folder: Path, seeds: range) -> None:
    """A damaged pair that this program wrote is refused, or what was damaged is read by nobody.

    The numbers of documents behind the places in an index are for other programs.
    """
    documents = read_documents(make_documents(folder), TOKENIZER)
    write_pair(folder / "good", documents)
    for seed in seeds:
        rng = random.Random(seed)
        for ending in (".bin", ".idx"):
            shutil.copy(folder / f"good{ending}", folder / f"bad{ending}")
        change_one_byte(folder / f"bad{rng.choice(['.bin', '.idx'])}", rng)
        config = DataConfig(data_file=str(folder / "bad"))
        found: list[Documents] = []
        if run(lambda c=config, f=found: f.append(read_documents(c, TOKENIZER))) == "read":  # type: ignore[misc]
            assert np.array_equal(found[0].tokens, documents.tokens), seed
            assert np.array_equal(found[0].starts, documents.starts), seed


def test_no_damage_to_a_marked_pair_is_read(tmp_path: Path) -> None:
    check_marked_pairs(tmp_path, range(QUICK))


@pytest.mark.slow
def test_none_of_thousands_of_damaged_pairs_is_read(tmp_path: Path) -> None:
    check_marked_pairs(tmp_path, range(10_000, 10_000 + FULL))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[DataConfig, Path]]:
    """A configuration whose data is in the cache, and the folder there."""
    monkeypatch.setattr(prepare, "CACHED_FROM", 0)
    config = make_documents(tmp_path)
    read_documents(config, TOKENIZER)
    (found,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    yield config, found


def check_cache(config: DataConfig, folder: Path, seeds: range) -> None:
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(sorted(name for name, raw in kept.items() if raw))
        change_one_byte(folder / name, rng)
        assert run(lambda: read_documents(config, TOKENIZER)) == "refused", (seed, name)
        (folder / name).write_bytes(kept[name])


def test_no_damage_to_the_cache_is_read(cached: tuple[DataConfig, Path]) -> None:
    check_cache(*cached, range(QUICK))


@pytest.mark.slow
def test_none_of_thousands_of_damaged_caches_is_read(cached: tuple[DataConfig, Path]) -> None:
    check_cache(*cached, range(10_000, 10_000 + FULL))


def test_an_array_of_rows_without_tokens_holds_no_document(tmp_path: Path) -> None:
    np.save(tmp_path / "empty.npy", np.zeros((5, 0), dtype=np.uint16))
    config = DataConfig(data_file=str(tmp_path / "empty.npy"))
    assert run(lambda: read_documents(config, TOKENIZER)) == "refused"


@pytest.mark.parametrize("text", ["\n" * 200_000, " \n" * 100_000 + "x User:", "User:" * 40_000])
@pytest.mark.parametrize("template", TEMPLATES)
def test_headings_are_found_in_linear_time(text: str, template: str) -> None:
    assert run(lambda: TEMPLATES[template].parse("x" + text)) == "read"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert run(
        lambda: read_documents(DataConfig(data_file=str(tmp_path / "a.csv")), TOKENIZER)
    ) == ("refused")
    (tmp_path / "b.csv").write_text("text,,\na,,\n")
    assert run(
        lambda: read_documents(DataConfig(data_file=str(tmp_path / "b.csv")), TOKENIZER)
    ) == ("read")


@pytest.mark.parametrize(
    ("value", "result"), [("false", "refused"), (5, "refused"), (False, "read")]
)
def test_train_is_true_or_false_and_no_text(value: object, result: str, tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "b"}
    row = {"messages": [{**turn, "train": value}, turn]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    config = DataConfig(data_file=str(tmp_path / "a.jsonl"))
    assert run(lambda: read_documents(config, TOKENIZER)) == result
