"""A folder means what its files mean; shares and splits at their edges."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data import prepare
from rwkv_peft.data.batching import Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenfiles import write_index
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError

TOKENIZER = Tokenizer()
CLI = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(path: Path | str, **settings: Any) -> Documents:
    return read_documents(DataConfig(data_file=str(path), **settings), TOKENIZER)


def texts(documents: Documents) -> list[str]:
    borders = pairwise(documents.starts.tolist())
    return [TOKENIZER.decode(documents.tokens[a:b].tolist()) for a, b in borders]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def rows(*given: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, in folders within folders, with others beside them."""
    top = tmp_path / "set"
    write(top / "a.txt", "one\r\ntwo\n\nthree\n")
    write(top / "b.jsonl", rows("four", "five"))
    write(top / "deep" / "er" / "c.json", '[{"text": "six"}, {"text": "seven"}]')
    write(top / "deep" / "d.csv", "text\neight\n")
    write(top / ".hidden.txt", "no")
    write(top / ".git" / "x.txt", "no")
    write(top / "README.md", "no")
    write(top / "dataset_infos.json", "{}")
    tokens = np.array([*TOKENIZER.encode("nine"), 0], dtype="<u2")
    tokens.tofile(top / "e.bin")
    with open(top / "e.idx", "wb") as file:
        write_index(file, np.array([len(tokens)]), tokens.dtype)
    np.save(top / "f.npy", tokens)
    return top


ALL = ["one\r\ntwo\n\nthree\n", "four", "five", "eight", "six", "seven", "nine", "nine"]


@pytest.mark.parametrize("cached_from", [0, 1 << 60])
def test_a_folder_means_what_its_files_mean(
    folder: Path, cached_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CACHED_FROM", cached_from)
    for _ in range(2):
        documents = read(folder)
        assert texts(documents) == ALL
        assert documents.where(2) == f"{folder / 'b.jsonl'}:2"
        assert documents.where(5) == f"{folder / 'deep' / 'er' / 'c.json'}:2"
        assert documents.report.notes == (
            f"{folder}: 2 files that are no data, left out: README.md, dataset_infos.json",
        )
        assert documents.report.duplicates.describe(documents.paths) == [f"{folder / 'f.npy'}:1"]


def test_a_broken_row_in_a_folder_is_named_with_its_own_file(folder: Path) -> None:
    write(folder / "deep" / "g.jsonl", rows("a") + "{\n")
    with pytest.raises(DataError, match=r"deep/g\.jsonl:2: not JSON"):
        read(folder)


def test_a_folder_is_one_part_of_a_mixture(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "z.jsonl", rows(*"abcdefgh"))
    documents = read(f"{folder}:0.5,{other}:0.5")
    assert [name for name, _ in documents.groups] == [str(folder), str(other)]
    assert [len(chosen) for _, chosen in documents.groups] == [8, 8]
    batches = make_batches(documents)
    assert batches.rows_of_pass == [8, 8]


def test_more_files_than_a_byte_can_count_are_read(tmp_path: Path) -> None:
    for i in range(300):
        write(tmp_path / "set" / f"{i:03}.txt", f"text {i}")
    documents = read(tmp_path / "set")
    assert texts(documents) == [f"text {i}" for i in range(300)]
    assert documents.where(299) == f"{tmp_path / 'set' / '299.txt'}:1"


def test_a_folder_of_texts_in_another_encoding_or_of_other_endings(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(2):
        (tmp_path / "set" / f"{i}.md").write_bytes(f"字 {i}\n\nb".encode("utf-16-le"))
    assert texts(read(tmp_path / "set", data_type="utf-16le")) == ["字 0\n\nb", "字 1\n\nb"]
    with pytest.raises(ConfigError, match=r"holds no file of data, only 0\.md, 1\.md: endings are"):
        read(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no file of data, only nothing"):
        read(tmp_path / "empty")


def test_links_in_a_folder_are_followed_to_files_and_never_round_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "x", rows("a"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").symlink_to(tmp_path / "blobs" / "x")
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    documents = read(tmp_path / "set")
    assert texts(documents) == ["a"]
    assert documents.report.notes[0].endswith(
        "2 files that are no data, left out: gone.jsonl, round"
    )


def test_splits_of_a_folder_are_told_by_the_names_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train-1.jsonl", rows("a", "b"))
    write(tmp_path / "set" / "train-2.jsonl", rows("c", "d"))
    write(tmp_path / "set" / "test" / "x.jsonl", rows("e"))
    documents = read(tmp_path / "set")
    assert texts(documents) == ["a", "b", "c", "d"]
    (note,) = documents.report.notes
    assert note.endswith(f"does not name, left out: {tmp_path / 'set' / 'test' / 'x.jsonl'}")
    for split, expected in {
        "test": ["e"],
        "train[1:3]": ["b", "c"],
        "train[-1:]": ["d"],
        "train[:50%]+test": ["a", "b", "e"],
    }.items():
        found = read(tmp_path / "set", sft_split=split)
        assert texts(found) == expected, split
    assert found.where(2).endswith("x.jsonl:1")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet", "saved"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[0:0]", None),
        ("train[:0%]", None),
        ("train[5:]", None),
        ("train[2:1]", None),
        ("test", None),
        ("train[", None),
        ("train[-5:]", ["a", "b", "c"]),
        ("train[:100]", ["a", "b", "c"]),
        ("train[2:]+train[:1]", ["c", "a"]),
    ],
)
def test_the_edges_of_a_split(
    name: str, split: str, expected: list[str] | None, tmp_path: Path
) -> None:
    from datasets import Dataset

    held = [{"text": text} for text in "abc"]
    path = tmp_path / name
    if name.endswith(".parquet"):
        Dataset.from_list(held).to_parquet(str(path))
    elif name == "saved":
        Dataset.from_list(held).save_to_disk(str(path))
    else:
        as_json = json.dumps(held) if name.endswith(".json") else rows(*"abc")
        write(path, "text\na\nb\nc\n" if name.endswith(".csv") else as_json)
    if expected is None:
        with pytest.raises(ConfigError, match="--sft_split"):
            read(path, sft_split=split)
    else:
        documents = read(path, sft_split=split)
        assert texts(documents) == expected
        last = documents.where(len(documents) - 1)
        assert last == f"{path}:{'abc'.index(expected[-1]) + 1 + name.endswith('.csv')}"


@pytest.mark.parametrize("name", ["a.txt", "a.npy"])
def test_a_split_of_what_has_no_rows_is_refused(name: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([5, 0]))
    write(tmp_path / "a.txt", "text")
    with pytest.raises(ConfigError, match=r"takes a part of rows, and .* has none"):
        read(tmp_path / name, sft_split="train[:1]")


def make_batches(documents: Documents, **changes: Any) -> Batches:
    settings: dict[str, Any] = {
        "dataload": "pad", "ctx_len": 8, "micro_bsz": 2, "seed": 0, "is_shuffled": True
    }  # fmt: skip
    return Batches(documents, **{**settings, **changes})


@pytest.mark.parametrize("dataload", ["pack", "pad", "only", "get"])
@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((1, 0), [4]),
        ((0, 2.5), [2]),
        ((1, 1e-300), [4, 1]),
        ((5e-324, 5e-324), [2, 2]),
        ((1e308, 1e308), [2, 2]),
        ((100, 1), [4, 1]),
        ((2, 1), [4, 2]),
    ],
)
def test_every_share_that_is_admitted_works(
    shares: tuple[float, float], expected: list[int], dataload: str, tmp_path: Path
) -> None:
    # two tokens a document, so that each is a row of length 1 or 2
    one = write(tmp_path / "a.jsonl", rows(*"abcd"))
    two = write(tmp_path / "b.jsonl", rows(*"xy"))
    documents = read(f"{one}:{shares[0]},{two}:{shares[1]}")
    assert len(documents.report.notes) == shares.count(0)
    ctx_len = 2 if dataload == "get" else 1
    batches = make_batches(documents, dataload=dataload, ctx_len=ctx_len, micro_bsz=1)
    assert batches.rows_of_pass == expected
    # two passes can be drawn
    drawn = [batches[position] for position in range(2 * len(batches))]
    assert all(batch.num_trained for batch in drawn)


def test_share_nought_is_said_in_the_report(cli: CLI, tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", rows("a"))
    two = write(tmp_path / "b.jsonl", "not read at all")
    done = cli("data", f"{one}:1,{two}:0")
    assert done.code == 0 and f"data: {two} has share 0, left out" in done.out


@pytest.mark.parametrize("dataload", ["pack", "pad", "only", "get"])
def test_a_part_of_a_mixture_without_a_token_is_named(dataload: str, tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", rows("a", "b"))
    two = write(tmp_path / "b.jsonl", rows("", ""))
    with pytest.raises(DataError, match=r"b\.jsonl: no trainable token"):
        make_batches(read(f"{one}:1,{two}:1"), dataload=dataload)


@pytest.mark.parametrize("dataload", ["pack", "pad", "only", "get"])
def test_one_document_of_one_target_makes_batches(dataload: str, tmp_path: Path) -> None:
    documents = read(write(tmp_path / "a.jsonl", rows("a")), prepare_workers=10**6)
    batches = make_batches(documents, dataload=dataload, ctx_len=1, micro_bsz=64, accumulate=100)
    # a window holds a document's first token as well, which is never a target
    assert sum(batches[i].num_trained for i in range(len(batches))) == 1


@pytest.mark.parametrize("names", [[""], ["question", ""], ["a", "a"]])
def test_fields_without_a_name_or_twice_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="give the name of a column, and each once"):
        DataConfig(sft_field=names)


@pytest.mark.parametrize("max_untrained", [0.0, 1.0])
def test_the_edges_of_how_many_may_be_left_out(max_untrained: float, tmp_path: Path) -> None:
    asks = json.dumps({"messages": [{"role": "user", "content": "q"}]}) + "\n"
    some, all_ = write(tmp_path / "a.jsonl", rows("a") + asks), write(tmp_path / "b.jsonl", asks)
    if max_untrained:
        assert len(read(some, max_untrained=max_untrained)) == 1
    else:
        with pytest.raises(DataError, match="in 1 of 2 documents"):
            read(some, max_untrained=max_untrained)
    with pytest.raises(DataError, match=r"no trainable token: 1 rows, 1 masked|in 1 of 1"):
        read(all_, max_untrained=max_untrained)


@pytest.mark.parametrize(
    "flags",
    [
        ("--accumulate_grad_batches", 1000),
        ("--epoch_steps", 1000),
        ("--micro_bsz", 500, "--dataload", "pad"),
        ("--ctx_len", 1),
    ],
)
def test_settings_larger_than_the_data_train(
    flags: tuple[object, ...], cli: CLI, model_file: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", rows("ab"))
    common = ("--proj_dir", tmp_path / "out", "--merge", 0, "--epoch_count", 1, "--ctx_len", 4)
    # epoch_steps counts micro-batches over as many passes as that takes
    steps = () if flags[0] != "--epoch_steps" else ("--accumulate_grad_batches", 1000)
    done = cli("train", model_file, path, *common, *flags, *steps)
    assert done.code == 0, done.err


def test_a_saved_data_set_of_several_splits_is_read_by_name(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    held = {"train": Dataset.from_list([{"text": "a"}]), "test": Dataset.from_list([{"text": "b"}])}
    DatasetDict(held).save_to_disk(str(tmp_path / "saved"))
    assert texts(read(tmp_path / "saved")) == ["a"]
    documents = read(tmp_path / "saved", sft_split="test")
    assert texts(documents) == ["b"] and documents.report.notes == ()


def test_no_name_beside_a_comma_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows("a"))
    with pytest.raises(ConfigError, match="there is no name beside a comma"):
        read(f"{path},")
