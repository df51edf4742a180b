"""The commands data and data prepare."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rwkv_peft.cli.prepare import magic_prime
from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenizer import Tokenizer

CLI = Callable[..., SimpleNamespace]
TOKENIZER = Tokenizer()
DIALOGUE = {
    "messages": [{"role": "user", "content": "你好。"}, {"role": "assistant", "content": "Hi"}]
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps(DIALOGUE), '{"text": "plain"}', "{", '{"text": ""}', '{"text": "plain"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "a.jsonl"


def texts(documents: Documents) -> list[str]:
    borders = zip(documents.starts[:-1], documents.starts[1:], strict=True)
    return [TOKENIZER.decode(documents.tokens[a:b].tolist()) for a, b in borders]


def test_data_says_what_training_would_see(cli: CLI, rows: Path) -> None:
    done = cli("data", rows, "--on_bad_row", "skip", "--ctx_len", 4)
    assert done.code == 0, done.err
    for line in (
        "format           messages 1, text 2",
        "num_rows         5",
        "documents        3",
        "over_long        1",
        f"data: 1 rows without a text, left out: {rows}:4",
        f"data: 1 rows that repeat an earlier one, kept: {rows}:5",
        f"  {rows}:3: not JSON",
        "User: 你好。\n\nAssistant:« Hi\n\n∎»",
        "pl«ain∎»" if len(TOKENIZER.encode("plain")) > 1 else "plain«∎»",
    ):
        assert line in done.out


def test_the_json_of_data_has_a_truth_value_for_each_token(cli: CLI, rows: Path) -> None:
    done = cli("data", rows, "--on_bad_row", "skip", "--json", "--show", 2)
    facts = json.loads(done.out)
    assert (facts["num_rows"], facts["documents"], len(facts["bad"])) == (5, 3, 1)
    assert sum(facts["lengths"].values()) == 3
    first, second = facts["rows"]
    assert first["text"] == "User: 你好。\n\nAssistant: Hi\n\n"
    assert first["tokens"] == [*TOKENIZER.encode(first["text"]), 0]
    said = [
        t for t, is_trained in zip(first["tokens"], first["trained"], strict=True) if is_trained
    ]
    assert said == [*TOKENIZER.encode(" Hi\n\n"), 0]
    assert second["trained"] == [False] + [True] * (len(second["tokens"]) - 1)


def test_data_takes_several_files_and_columns(cli: CLI, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("q,r\nwhy,so\n", encoding="utf-8")
    files = (tmp_path / "a.csv", tmp_path / "b.csv")
    flags = ("--data_type", "sft", "--sft_field", "q", "r", "--template", "chat", "--json")
    facts = json.loads(cli("data", *files, *flags).out)
    assert facts["files"] == [str(file) for file in files]
    assert [row["text"] for row in facts["rows"]] == ["User: why\n\nAssistant: so\n\n"] * 2


def test_prepare_writes_a_pair_that_reads_as_the_file(
    cli: CLI, make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    given = ["one", "二。\n\n", "three words"]
    path = make_data_file(given)
    done = cli("data", "prepare", path, "--output", tmp_path / "out", "--data_type", "binidx")
    assert done.code == 0, done.err
    documents = read_documents(DataConfig(data_file=str(tmp_path / "out")), TOKENIZER)
    assert texts(documents) == given
    assert documents.tokens.dtype == np.uint16 and isinstance(documents.tokens, np.memmap)
    assert documents.report.num_endless == 0
    cli("data", "prepare", path, "--output", tmp_path / "bare", "--append_eod", 0)
    bare = read_documents(DataConfig(data_file=str(tmp_path / "bare")), TOKENIZER)
    assert bare.report.num_endless == 3


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_pair_that_does_not_fit_on_the_disk_leaves_the_previous_one_and_no_rest(
    cli: CLI, make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = make_data_file(["word " * 2000]), tmp_path / "pair"
    given = ["data", "prepare", str(path), "--output", str(folder / "out")]
    assert cli(*given).code == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    # a limit on the size of files fails a write just as a full disk does
    code = (
        "import resource, sys\n"
        "from rwkv_peft.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *given, "--copies", "50", "--overwrite", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    said = (
        f"error: cannot write {folder / 'out'}.bin: File too large; the previous file is untouched"
    )
    assert done.stderr.splitlines()[-1].startswith(said)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_prepare_takes_the_arguments_of_json2binidx(
    cli: CLI, make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_data_file(["one", "two"])
    done = cli(
        "data", "prepare", "--input", path, "--output-prefix", tmp_path / "out",
        "--vocab", "./rwkv_vocab_v20230424.txt", "--dataset-impl", "mmap",
        "--tokenizer-type", "RWKVTokenizer", "--workers", 1, "--append-eod",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "out_text_document.bin").exists()
    documents = read_documents(DataConfig(data_file=str(tmp_path / "out")), TOKENIZER)
    assert texts(documents) == ["one", "two"]
    done = cli("data", "prepare", "--input", path, "--tokenizer-type", "HFTokenizer")
    assert done.code == 2 and "only RWKVTokenizer can be used" in done.err


def test_prepare_takes_the_arguments_of_make_data(
    cli: CLI,
    make_data_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [f"document {i} " * 5 for i in range(20)]
    make_data_file(given, name="d.jsonl")
    monkeypatch.chdir(tmp_path)
    done = cli("data", "prepare", "d.jsonl", 3, 4)
    assert done.code == 0, done.err
    found = texts(read_documents(DataConfig(data_file="d", data_type="binidx"), TOKENIZER))
    copies = [found[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(copy) == sorted(given) for copy in copies)
    assert copies[0] != copies[1] != copies[2]
    tokens = sum(len(TOKENIZER.encode(text)) + 1 for text in given) * 3
    assert f"magic_prime {magic_prime(tokens, 4)} " in done.out


def test_the_magic_prime_is_the_largest_below_with_remainder_two() -> None:
    for tokens, ctx_len in ((100_000, 512), (70_635, 512), (5_000_000, 1024)):
        found = magic_prime(tokens, ctx_len)
        limit = tokens // ctx_len - 1
        primes = [n for n in range(2, limit + 1) if all(n % d for d in range(2, int(n**0.5) + 1))]
        assert found == max(n for n in primes if n % 3 == 2)
    assert magic_prime(10, 512) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data",), "no data given"),
        (("data", "prepare"), "no data given"),
        (("data", "none.jsonl"), "there is no file none.jsonl"),
        (("data", "prepare", "a.jsonl", "--loss_mask", "qa"), "a binidx pair holds no masks"),
        (("data", "prepare", "a.jsonl", "x", "3"), "the old form is FILE N_EPOCH CTX_LEN"),
        (("data", "prepare", "w.jsonl"), "rows with weights, which a binidx pair cannot hold"),
        (("data", "w.jsonl", "--loss_mask", "qa"), "leaves nothing to train in 1 of 1 documents"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    args: tuple[Any, ...], message: str, cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.jsonl").write_text('{"text": "a", "weight": 0.5}\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    done = cli(*args)
    assert done.code == 2
    assert message in done.err and done.err.count("\n") == 1
