"""From files of every kind to documents: nothing is lost, nothing is silent."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data import prepare
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenfiles import write_index
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError

TOKENIZER = Tokenizer()
TURNS = [{"role": "user", "content": "你好。"}, {"role": "assistant", "content": "Hi — 好。"}]
AS_TEXT = "User: 你好。\n\nAssistant: Hi — 好。\n\n"


def read(path: Path | str, **settings: Any) -> Documents:
    return read_documents(DataConfig(data_file=str(path), **settings), TOKENIZER)


def texts(documents: Documents) -> list[str]:
    """The text of each document, which ends with token 0 and holds no other."""
    found = []
    for start, end in zip(documents.starts[:-1], documents.starts[1:], strict=True):
        tokens = documents.tokens[start:end].tolist()
        assert tokens[-1] == 0 and 0 not in tokens[:-1]
        found.append(TOKENIZER.decode(tokens, errors="strict"))
    return found


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pair(path: Path, documents: list[list[int]], dtype: str) -> Path:
    tokens = np.array([token for ids in documents for token in ids], dtype=dtype)
    tokens.tofile(f"{path}.bin")
    with open(f"{path}.idx", "wb") as file:
        write_index(file, np.array([len(ids) for ids in documents]), np.dtype(dtype))
    return path


ROWS: list[dict[str, Any]] = [{"text": "one"}, {"text": "二。\n\n"}, {"text": "three words more"}]


def as_csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def as_table(path: Path) -> None:
    from datasets import Dataset

    table = Dataset.from_list(ROWS)
    {".parquet": table.to_parquet, "": table.save_to_disk}[path.suffix](str(path))


def as_arrow(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: write_jsonl(path, ROWS),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "a.csv": as_csv,
    "a.tsv": as_csv,
    "a.parquet": as_table,
    "a.arrow": as_arrow,
    "folder": as_table,
}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("split", "kept"), [("train", [0, 1, 2]), ("train[1:]", [1, 2])])
def test_every_kind_of_file_gives_the_same_documents(
    name: str, split: str, kept: list[int], tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / name)
    documents = read(tmp_path / name, sft_split=split)
    assert texts(documents) == [ROWS[i]["text"] for i in kept]
    assert documents.report.num_rows == len(kept)


def test_a_folder_of_parquet_files_is_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(2):
        as_table(tmp_path / "set" / f"train-{i}.parquet")
    assert len(read(tmp_path / "set", sft_split="train[:5]")) == 5


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {
            "conversations": [
                {"from": "human", "value": "你好。"},
                {"from": "gpt", "value": "Hi — 好。"},
            ]
        },
        {"instruction": "你好。", "output": "Hi — 好。"},
        {"instruction": "你好。", "input": "", "output": "Hi — 好。", "history": []},
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": [{"type": "text", "text": "Hi — 好。"}]},
            ]
        },
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"text": AS_TEXT},
    ],
)
def test_the_form_of_a_row_is_found_from_its_keys(row: dict[str, Any], tmp_path: Path) -> None:
    assert texts(read(write_jsonl(tmp_path / "a.jsonl", [row]))) == [AS_TEXT]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no trainable token: the file is empty"),
        (b"\n  \n", "no trainable token: the file is empty"),
        (b'{"text": ""}\n', "no trainable token: 1 rows, 1 empty"),
        (b'{"messages": []}\n', "no trainable token: 1 rows, 1 empty"),
        (b'{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not JSON"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', r"bad.jsonl:3: no known form has the .*\(txt\)"),
        (b'["a"]\n', r"bad.jsonl:1: a row must be an object .*found a list"),
        (b'{"text": 7}\n', r'bad.jsonl:1: "text" must be a string, found a int'),
        (b'{"text": "\xff"}\n', r"bad.jsonl:1: byte 11 of the line is not UTF-8"),
        (b'{"text": "\\ud83d"}\n', r"bad.jsonl:1: .*lone surrogate"),
        (b'{"text": "a", "weight": -1}\n', r'bad.jsonl:1: "weight" must be a number from 0'),
        (b'{"text": "a", "state": []}\n', r'bad.jsonl:1: "state" must be a name'),
        (b'{"messages": [{"content": "a"}]}\n', r'bad.jsonl:1: messages\[0\] has no "role"'),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
            r"bad.jsonl:1: messages\[0\] has a part of type image: only text can be trained",
        ),
        (
            b'{"messages": [{"role": "narrator", "content": "a"}]}\n',
            r"bad.jsonl:1: the template chat has no role 'narrator'",
        ),
    ],
)
def test_a_broken_data_file_is_named_with_its_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "bad.jsonl")


def test_bad_rows_are_skipped_and_listed_on_demand(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b"{", b'{"text": ""}', b"", b'{"text": "\xff"}', b'{"text": "b"}',
             b'{"text": "a"}']  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    documents = read(path, on_bad_row="skip")
    assert texts(documents) == ["a", "b", "a"]
    assert documents.lines.tolist() == [1, 6, 7]
    report = documents.report
    assert report.num_rows == 6
    assert [bad.split(": ")[0] for bad in report.bad] == [f"{path}:2", f"{path}:5"]
    assert report.empty.table.tolist() == [[0, 3]]
    assert report.duplicates.table.tolist() == [[0, 7]]
    assert report.num_bytes == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'[{"text": "a"}, {"text": "b"]',
            r"a.json: not one .*delimiter: line 1 column 29",
        ),
        (
            "a.json",
            b'[\n{"text": "a"}',
            r"a.json: not one JSON array: .*delimiter: line 2 column 14",
        ),
        ("a.json", b'[\n{"text": "a"},\n{"text" 1}]', r"a.json: not one .*delimiter: line 3 col"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', r"a.json: .*Extra data: line 2 column 1"),
        ("a.json", b'[{"text": "a"}, 7]', r"a.json:2: a row must be an object .*found a int"),
        ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]", r"a.json: not usable JSON: .*digits"),
        ("a.json", b"[" * 100_000, r"a.json: not usable JSON: .*recursion"),
        ("a.json", b'[{"text": "\xff"}]', r"a.json: .*not UTF-8"),
        ("a.csv", b"text,b\nx\n", r"a.csv:2: 1 values for 2 columns"),
        ("a.csv", b"text,b\nx,\xff\n", r"a.csv:2: not UTF-8"),
        ("a.csv", b'text\n"x', r"a.csv:2: not CSV"),
        ("a.parquet", b"PAR1nothing", r"a.parquet: datasets cannot read it"),
        ("a.arrow", b"", r"a.arrow: datasets cannot read it"),
        ("a.txt", b"abc\xff", r"a.txt: not utf-8"),
        ("a.txt", b"", r"no trainable token"),
        ("a.npy", b"nothing", r"a.npy: not a numpy file"),
    ],
)
def test_a_broken_file_of_another_kind_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_row_of_a_json_array_is_named_by_its_number(indent: int | None, tmp_path: Path) -> None:
    rows = [{"text": f'row {i} 字\\" ]' * (1 + 97 * i % 50)} for i in range(300)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    documents = read(path)
    assert texts(documents) == [row["text"] for row in rows]
    assert documents.lines.tolist() == list(range(1, 301))
    assert documents.where(299) == f"{path}:300"


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("name", ["a", "a.bin", "a.idx"])
def test_a_binidx_pair_is_mapped_and_not_copied(name: str, dtype: str, tmp_path: Path) -> None:
    ids = [[*TOKENIZER.encode(text), 0] for text in ("one", "二。", "three")]
    write_pair(tmp_path / "a", [ids[0], [], *ids[1:]], dtype)
    documents = read(tmp_path / name)
    assert texts(documents) == ["one", "二。", "three"]
    assert isinstance(documents.tokens, np.memmap) and documents.tokens.dtype == dtype
    assert documents.report.num_endless == 0


def test_a_pair_may_lack_its_suffix_and_its_ends_of_documents(tmp_path: Path) -> None:
    write_pair(tmp_path / "a_text_document", [[11, 24281], [59, 0]], "uint16")
    documents = read(tmp_path / "a")
    assert documents.starts.tolist() == [0, 2, 4]
    assert documents.report.num_endless == 1


def test_a_file_comes_before_a_pair_of_its_name_unless_the_pair_is_asked_for(
    tmp_path: Path,
) -> None:
    write_jsonl(tmp_path / "a", ROWS)
    write_jsonl(tmp_path / "c.jsonl", ROWS)
    write_pair(tmp_path / "a", [[11, 0]], "uint16")
    assert len(read(tmp_path / "a")) == 3
    assert len(read(tmp_path / "a", data_type="binidx")) == 1
    assert len(read(tmp_path / "c")) == 3


def test_a_mask_of_a_binidx_pair_is_that_of_its_text(tmp_path: Path) -> None:
    plain = read(write_jsonl(tmp_path / "a.jsonl", [{"text": AS_TEXT}] * 3), loss_mask="qa")
    ids = plain.tokens[plain.starts[0] : plain.starts[1]].tolist()
    write_pair(tmp_path / "b", [ids, TOKENIZER.encode("no roles here"), ids, ids], "int32")
    with pytest.raises(DataError, match=r"1 of 4 documents, the first at .*b:2"):
        read(tmp_path / "b", loss_mask="qa")
    documents = read(tmp_path / "b", loss_mask="qa", max_untrained=0.25)
    assert documents.weights is not None and plain.weights is not None
    assert documents.tokens.tolist() == plain.tokens.tolist()
    assert documents.weights.tolist() == plain.weights.tolist()
    assert documents.lines.tolist() == [1, 3, 4]
    assert documents.report.untrained.table.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"X" + raw[1:], "not the index of a binidx pair"),
        (lambda raw: raw[:-3], "do not hold 2 documents"),
        (lambda raw: raw[:17] + b"\x06" + raw[18:], "dtype code 6 cannot be read"),
        (lambda raw: raw[:34] + b"\x03" + raw[35:], "do not follow one another"),
        (lambda raw: raw[:5], "not the index"),
    ],
)
def test_a_damaged_index_is_refused(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    write_pair(tmp_path / "a", [[11, 0], [24281, 0]], "uint16")
    raw = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(change(raw))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a")


def test_raw_tokens_are_documents_between_their_ends(tmp_path: Path) -> None:
    ids = [11, 0, 24281, 59, 0, 11]
    np.array(ids, dtype="<u2").tofile(tmp_path / "a.u16")
    np.save(tmp_path / "a.npy", np.array(ids))
    np.save(tmp_path / "b.npy", np.array(ids).reshape(2, 3))
    for name, data_type in (("a.u16", "uint16"), ("a.npy", "auto")):
        documents = read(tmp_path / name, data_type=data_type)
        assert documents.tokens.tolist() == ids
        assert documents.starts.tolist() == [0, 2, 5, 6]
    assert read(tmp_path / "b.npy").starts.tolist() == [0, 3, 6]
    np.save(tmp_path / "c.npy", np.array([[1.5]]))
    with pytest.raises(DataError, match="tokens must be whole numbers"):
        read(tmp_path / "c.npy")


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[300, 0]], "uint16")
    with pytest.raises(DataError, match="token id 300 is outside the vocabulary of 300"):
        read_documents(DataConfig(data_file=str(tmp_path / "a")), Tokenizer(300))
    write_pair(tmp_path / "b", [[5, -1, 0]], "int32")
    with pytest.raises(DataError, match="token id -1 is outside"):
        read(tmp_path / "b")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le"])
def test_a_text_file_is_one_document_tokenised_as_a_whole(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "TEXT_BLOCK", 137)
    text = "".join(f"{i}: tokens 字。\n\n{'=' * (i % 200)}😀 \r\n" for i in range(200))
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    data_type = "utf-16le" if "16" in encoding else "auto"
    documents = read(tmp_path / "a.txt", data_type=data_type)
    assert documents.tokens.tolist() == [*TOKENIZER.encode(text), 0]
    assert documents.report.num_bytes == len(text.encode())


def test_several_files_are_read_in_their_order_with_their_shares(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    two = write_jsonl(tmp_path / "b,c.jsonl", [{"messages": TURNS}])
    write_pair(tmp_path / "d", [[*TOKENIZER.encode("d"), 0]], "int32")
    documents = read(f"{one},{tmp_path / 'd'}")
    assert texts(documents) == ["a", "b", "d"]
    assert documents.sources.tolist() == [0, 0, 1]
    assert documents.where(2) == f"{tmp_path / 'd'}:1"
    assert documents.shares is None
    assert texts(read(two)) == [AS_TEXT]
    mixed = read(f"{one}:0.7,{tmp_path / 'd'}:0.3")
    assert mixed.shares == (0.7, 0.3)


@pytest.mark.parametrize(
    ("data_file", "message"),
    [
        ("a.jsonl,none.jsonl", "there is no file none.jsonl"),
        ("a.jsonl:0.5,a.jsonl", "give every file a share"),
        ("a.jsonl:-1,a.jsonl:2", "a share is a number not below 0, got -1"),
        ("a.jsonl:x,a.jsonl:2", "a share is a number not below 0, got x"),
        ("a.jsonl:0,a.jsonl:0", "add up to nothing"),
        ("", "no data given"),
        ("lone.bin", "needs lone.bin and lone.idx, one is missing"),
    ],
)
def test_a_list_of_files_that_cannot_be_had_is_refused(
    data_file: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "lone.bin").write_bytes(b"\1\0")
    with pytest.raises(ConfigError, match=message):
        read(data_file)


def test_weights_and_states_of_rows_reach_the_documents(tmp_path: Path) -> None:
    rows = [
        {"text": "a"},
        {"text": "b", "weight": 0.5, "state": "cat"},
        {"text": "c", "state": "dog"},
        {"text": "d", "weight": 0},
    ]
    documents = read(write_jsonl(tmp_path / "a.jsonl", rows), max_untrained=0.5)
    assert documents.weights is not None and documents.states is not None
    assert documents.weights.tolist() == [1, 1, 0.5, 0.5, 1, 1]
    assert documents.weights.dtype == np.float32
    assert documents.states.tolist() == ["", "cat", "dog"]
    assert documents.report.untrained.table.tolist() == [[0, 4]]
    assert documents.num_trained == 3


@pytest.fixture
def caches_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CACHED_FROM", 0)


@pytest.mark.usefixtures("caches_everything")
def test_prepared_data_is_found_by_its_content(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": TURNS}, {"text": "a", "weight": 0.25}, {"text": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    folder = tmp_path / "cache" / "rwkv-peft" / "data"
    first = read(path)
    assert isinstance(first.tokens, np.memmap)
    (entry,) = folder.iterdir()
    stamp = (entry / "tokens").stat().st_mtime_ns
    again = read(path.rename(tmp_path / "b.jsonl"))
    assert (entry / "tokens").stat().st_mtime_ns == stamp and len(list(folder.iterdir())) == 1
    in_memory = _in_memory(tmp_path / "b.jsonl")
    for name in ("tokens", "starts", "lines", "weights"):
        for other in (again, in_memory):
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))
    assert first.report.num_rows == again.report.num_rows == in_memory.report.num_rows == 3
    assert again.paths == (str(tmp_path / "b.jsonl"),)
    # whatever changes the result changes the place
    read(tmp_path / "b.jsonl", loss_mask="none")
    read(tmp_path / "b.jsonl", template="think")
    write_jsonl(tmp_path / "b.jsonl", [*rows, {"text": "b"}])
    assert len(read(tmp_path / "b.jsonl")) == 4
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("cached_from", [0, 1 << 60])
def test_weights_widen_as_files_with_others_follow(
    cached_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CACHED_FROM", cached_from)
    monkeypatch.setattr("rwkv_peft.data.store.BLOCK", 2)
    rows: list[dict[str, Any]] = [
        {"text": "a b c d e"}, {"messages": TURNS}, {"text": "a"}, {"text": "b", "weight": 0.25}
    ]  # fmt: skip
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    alone = [read(path) for path in paths]
    kinds: list[Any] = [None, np.uint8, np.uint8, np.float32]
    expected: list[float] = []
    for i, one in enumerate(alone):
        expected += [1.0] * len(one.tokens) if one.weights is None else one.weights.tolist()
        weights = read(",".join(map(str, paths[: i + 1]))).weights
        assert (None if weights is None else weights.dtype) == kinds[i]
        assert weights is None or weights.tolist() == expected


def _in_memory(path: Path) -> Documents:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CACHED_FROM", 1 << 60)
        return read(path)


@pytest.mark.usefixtures("caches_everything")
def test_a_broken_row_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read(tmp_path / "a.jsonl")
    assert not list((tmp_path / "cache" / "rwkv-peft" / "data").iterdir())


@pytest.mark.usefixtures("caches_everything")
def test_damaged_prepared_data_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    read(path)
    (entry,) = (tmp_path / "cache" / "rwkv-peft" / "data").iterdir()
    (entry / "lines").unlink()
    with pytest.raises(DataError, match=f"the prepared data in {entry} is damaged: delete it"):
        read(path)


def test_runs_that_prepare_the_same_data_at_once_all_get_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS * 50)
    code = (
        "import sys, rwkv_peft.data.prepare as p\n"
        "from rwkv_peft.config import DataConfig\n"
        "from rwkv_peft.data.tokenizer import Tokenizer\n"
        "p.CACHED_FROM = 0\n"
        "print(len(p.read_documents(DataConfig(data_file=sys.argv[1]), Tokenizer())))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [run.communicate()[0].strip() for run in runs] == [b"150"] * 4
    assert len(list((tmp_path / "cache" / "rwkv-peft" / "data").iterdir())) == 1


def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} " * (i % 30)} for i in range(3000)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    one, two = read(path), read(path, prepare_workers=2)
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.lines.tolist() == two.lines.tolist()
    assert one.report.empty.table.tolist() == two.report.empty.table.tolist()


def test_files_are_read_without_datasets_where_it_is_not_needed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    as_csv(tmp_path / "a.csv")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from rwkv_peft.config import DataConfig\n"
        "from rwkv_peft.data.prepare import read_documents\n"
        "from rwkv_peft.data.tokenizer import Tokenizer\n"
        "for name in ('a.jsonl', 'a.csv', 'a.parquet'):\n"
        "    print(len(read_documents(DataConfig(data_file=name), Tokenizer())))\n"
    )
    (tmp_path / "a.parquet").write_bytes(b"x")
    root = str(Path(prepare.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout == "3\n3\n"
    assert "pip install 'rwkv-peft[data]'" in done.stderr
