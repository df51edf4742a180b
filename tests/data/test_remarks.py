"""What a person should know of rows is counted and shown with the first places."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data import prepare
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.remarks import REMARKS
from rwkv_peft.data.tokenfiles import write_index
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError

CLI = Callable[..., SimpleNamespace]
TOKENIZER = Tokenizer()
RAW = "User: q\n\nAssistant: a"


def dialogue(*said: str) -> dict[str, Any]:
    """Messages, each `role: words`."""
    pairs = [each.split(": ", 1) for each in said]
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


GOOD = dialogue("system: s", "user: q", "assistant: a")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def find(path: Path, **settings: Any) -> dict[str, list[int]]:
    documents = read_documents(DataConfig(data_file=str(path), **settings), TOKENIZER)
    remarks = documents.report.remarks
    return {name: places.table[:, 1].tolist() for name, places in remarks.items()}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, []),
        ({"text": "plain\n\ntext"}, []),
        ({"prompt": "a\n\nb", "completion": "c\n\nd"}, []),
        (dialogue("user: q", "assistant: a\n\nb"), ["blank_line"]),
        (dialogue("user: q", "assistant: a\n \t\r\nb"), ["blank_line", "carriage_return"]),
        (dialogue("user: q\n\nr", "assistant: a\n\n"), []),
        ({"question": "q", "answer": "a\n\nb"}, ["blank_line"]),
        (dialogue("user: q", "assistant:  ", "user: r", "assistant: b"), ["empty_answer"]),
        ({"instruction": "q", "output": None}, ["empty_answer"]),
        (dialogue("user: q", "assistant: a", "user: r"), ["no_last_answer"]),
        (dialogue("user: q", "assistant: a", "tool: r"), ["no_last_answer"]),
        (dialogue("system: s", "assistant: a"), ["answer_first"]),
        ({"text": "a\r\nb"}, ["carriage_return"]),
        (dialogue("user: a\r\nb", "assistant: a"), ["carriage_return"]),
        ({"text": "look: <image>"}, ["image"]),
        (dialogue("user: <image>\nq", "assistant: a"), ["image"]),
        (dialogue("user: <|vision_start|>q", "assistant: a"), ["image"]),
        *(
            ({"prompt": "q", "completion": "a", "label": label}, ["preference"])
            for label in (True, False, "True", 0, "1")
        ),
        ({"prompt": "q", "completion": "a", "label": "sport"}, []),
        ({"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}, ["preference"]),
        ({"text": "a review", "label": 1}, []),
        ({"text": "a", "weight": 0.5, "state": "s"}, ["weight", "state"]),
        ({"text": "a", "weight": None}, []),
        ({"text": RAW}, ["dialogue"]),
        ({"text": "\n" + RAW}, ["dialogue"]),
        ({"text": RAW.replace("\n", "\r\n")}, ["carriage_return", "dialogue"]),
        ({"text": "User: is a word"}, []),
    ],
)
def test_a_remark_is_made(row: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, row)
    found = find(path, max_untrained=1.0)
    assert found == {name: [2] for name in expected}


@pytest.mark.parametrize("mask", ["none", "qa"])
def test_a_text_with_roles_needs_no_word_where_the_mask_was_chosen(
    mask: str, tmp_path: Path
) -> None:
    assert find(write(tmp_path / "a.jsonl", {"text": RAW}), loss_mask=mask) == {}


def test_a_chosen_column_of_preferences_needs_no_word(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert find(path, sft_field=["prompt", "chosen"]) == {}


def test_a_plain_text_file_is_looked_at_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(RAW.replace("\n", "\r\n").encode())
    assert find(tmp_path / "a.txt") == {"carriage_return": [1], "dialogue": [1]}


@pytest.mark.parametrize("cached_from", [0, 1 << 60])
def test_remarks_are_kept_with_prepared_data(
    cached_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CACHED_FROM", cached_from)
    path = write(tmp_path / "a.jsonl", {"text": RAW}, {"text": "a", "weight": 2}, {"text": RAW})
    for _ in range(2):
        found = find(path, data_cache=str(tmp_path / "cache"))
        assert found == {"weight": [2], "dialogue": [1, 3]}


def test_data_and_the_plan_say_each_remark_in_a_line(
    cli: CLI, model_file: Path, tmp_path: Path
) -> None:
    raw = [{"text": RAW + str(i)} for i in range(7)]
    path = write(tmp_path / "a.jsonl", *raw, dialogue("user: q", "assistant: a\n\nb"))
    places = ", ".join(f"{path}:{i}" for i in range(1, 6))
    lines = [
        f"data: 1 rows {REMARKS['blank_line']}: {path}:8",
        f"data: 7 rows {REMARKS['dialogue']}: {places}, ...",
    ]
    shown = cli("data", path)
    assert all(line in shown.out.splitlines() for line in lines)
    facts = json.loads(cli("data", path, "--json").out)
    assert facts["remarks"]["blank_line"] == [f"{path}:8"]
    flags = ("--proj_dir", tmp_path / "out", "--ctx_len", 16, "--epoch_steps", 1, "--merge", 0)
    trained = cli("train", model_file, path, *flags)
    assert trained.code == 0, trained.err
    said = trained.out + trained.err
    assert all(line in said for line in lines)
    assert "the model's vocabulary of 320 is neither that of RWKV World (65536)" in said


def test_data_takes_the_vocabulary_of_a_model_and_says_which_it_used(
    cli: CLI, make_model_file: Callable[..., Path], data_file: Path
) -> None:
    own = json.loads(cli("data", data_file, "--load_model", make_model_file(), "--json").out)
    told = json.loads(cli("data", data_file, "--vocab_size", 320, "--json").out)
    assert own["vocab_size"] == 320 and own["tokens"] == told["tokens"]
    assert own["notes"][0].startswith("the model's vocabulary of 320 is neither")
    shown = cli("data", data_file).out
    assert "vocab_size       65,536" in shown
    assert "data: counted with the vocabulary of RWKV World; --load_model takes a model's" in shown
    both = cli("data", data_file, "--load_model", make_model_file(), "--vocab_size", 300)
    assert both.code == 2 and "has a vocabulary of 320; give one of the two" in both.err


@pytest.mark.parametrize("vocab_size", [65525, 65529, 65530, 65536, 5120])
def test_a_vocabulary_of_world_needs_no_note(vocab_size: int) -> None:
    tokenizer = Tokenizer(vocab_size)
    assert tokenizer.describe_mismatch() == "" and not tokenizer.is_foreign


@pytest.mark.parametrize("vocab_size", [257, 320, 512, 32000, 50000, 70000, 152064])
def test_another_vocabulary_is_noted_and_works(vocab_size: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer(vocab_size)
    path = write(tmp_path / "a.jsonl", {"text": "words"})
    documents = read_documents(DataConfig(data_file=str(path)), tokenizer)
    assert documents.report.notes == (tokenizer.describe_mismatch(),)
    assert f"vocabulary of {vocab_size} is neither" in documents.report.notes[0]
    assert tokenizer.decode(documents.tokens) == "words"


@pytest.mark.parametrize("vocab_size", [50257, 50277, 50304])
def test_texts_are_refused_for_a_model_with_another_tokenizer(
    vocab_size: int, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(vocab_size)
    (tmp_path / "a.txt").write_text("words")
    message = f"a vocabulary of {vocab_size} is that of the GPT-NeoX tokenizer"
    for path in (write(tmp_path / "a.jsonl", {"text": "words"}), tmp_path / "a.txt"):
        for settings in ({}, {"on_bad_row": "skip"}, {"loss_mask": "none"}):
            with pytest.raises(ConfigError, match=message):
                read_documents(DataConfig(data_file=str(path), **settings), tokenizer)
    # its own tokens are trained, without a mask that would need their text
    np.array([7, 50000, 0], dtype="<u2").tofile(tmp_path / "b.bin")
    with open(tmp_path / "b.idx", "wb") as file:
        write_index(file, np.array([3]), np.dtype("<u2"))
    pair = str(tmp_path / "b")
    assert read_documents(DataConfig(data_file=pair), tokenizer).report.notes == ()
    with pytest.raises(ConfigError, match=message):
        read_documents(DataConfig(data_file=pair, loss_mask="qa"), tokenizer)


def test_a_model_with_another_tokenizer_is_trained_on_tokens_and_not_on_texts(
    cli: CLI, make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    model = make_model_file(vocab_size=50277)
    np.save(tmp_path / "own.npy", np.array([7, 50000, 9, 0]))
    flags = ("--proj_dir", tmp_path / "out", "--ctx_len", 8, "--merge", 0, "--epoch_count", 1)
    done = cli("train", model, data_file, *flags)
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert done.err.splitlines()[-1].startswith("error: a vocabulary of 50277 is that of the GPT-N")
    generated = cli("generate", "--load_model", model, "--prompt", "a", "--max_tokens", 1)
    assert generated.code == 2 and "a vocabulary of 50277 is" in generated.err
    # before anything is asked
    chat = cli("chat", model, "--accelerator", "cpu")
    assert chat.code == 2 and "a vocabulary of 50277 is" in chat.err and not chat.out
    shown = cli("data", tmp_path / "own.npy", "--load_model", model)
    assert shown.code == 0 and "7 «50000 9 0 »" in shown.out
    assert cli("train", model, tmp_path / "own.npy", *flags).code == 0
