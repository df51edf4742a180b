"""Documents kept aside: none is trained, equal texts stand together."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.held_out import read_held_out, split_documents
from rwkv_peft.data.pairs import write_pair
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError

TOKENIZER = Tokenizer(320)
TEXTS = [f"text {i}: " + "la " * (i % 5) for i in range(400)]


def read(path: str | Path, **changes: object) -> Documents:
    return read_documents(replace(DataConfig(data_file=str(path)), **changes), TOKENIZER)


def texts_of(documents: Documents) -> list[str]:
    borders = [(documents.starts[i], documents.starts[i + 1]) for i in documents.indices]
    tokens = (documents.tokens[start:end].tolist() for start, end in borders)
    return [TOKENIZER.decode([x for x in ids if x]) for ids in tokens]


def test_equal_texts_stand_on_one_side_and_all_are_there(
    make_data_file: Callable[..., Path],
) -> None:
    texts = TEXTS + TEXTS[::-1] + TEXTS[:50]
    trained, held_out = split_documents(read(make_data_file(texts)), 0.1)
    one, other = texts_of(trained), texts_of(held_out)
    assert sorted(one + other) == sorted(texts)
    assert not set(one) & set(other)
    # of 400 different texts 40 are expected, with a standard deviation of 6
    assert 16 < len(set(other)) < 64
    assert trained.num_tokens + held_out.num_tokens == len(trained.tokens)


def test_a_text_stays_on_its_side_whatever_comes_with_it(
    make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    _, held_out = split_documents(read(make_data_file(TEXTS[:200])), 0.1)
    _, more = split_documents(read(make_data_file(TEXTS[::-1], name="more.jsonl")), 0.1)
    assert set(texts_of(held_out)) == set(texts_of(more)) & set(TEXTS[:200])
    write_pair(tmp_path / "pair", read(make_data_file(TEXTS)))
    _, binidx = split_documents(read(tmp_path / "pair"), 0.1)
    assert sorted(texts_of(binidx)) == sorted(texts_of(more))
    _, unended = split_documents(read(make_data_file(TEXTS), append_eod=0), 0.1)
    assert sorted(texts_of(unended)) == sorted(texts_of(more))


def test_parquet_and_mixtures_are_split_too(
    make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": TEXTS[:200]}), tmp_path / "a.parquet")
    other = make_data_file(TEXTS[200:])
    documents = read(f"{tmp_path / 'a.parquet'}:0.5,{other}:0.5")
    trained, held_out = split_documents(documents, 0.2)
    assert sorted(texts_of(trained) + texts_of(held_out)) == sorted(TEXTS)
    assert trained.shares == (0.5, 0.5) and held_out.shares is None
    assert [len(chosen) for _, chosen in trained.groups] == [
        np.count_nonzero(trained.sources[trained.indices] == i) for i in (0, 1)
    ]


def test_a_small_share_of_few_documents_is_one_text(make_data_file: Callable[..., Path]) -> None:
    trained, held_out = split_documents(read(make_data_file(["a b", "c d", "c d"])), 0.001)
    assert len(trained) + len(held_out) == 3 and len(set(texts_of(held_out))) == 1
    trained, held_out = split_documents(read(make_data_file(["a b", "c d", "e f"])), 0.999)
    assert len(set(texts_of(trained))) == 1 and len(held_out) == 2


@pytest.mark.parametrize("texts", [["one text"], ["again", "again", "again"]])
def test_one_text_cannot_be_split(texts: list[str], make_data_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"--val_split 0\.5: the data is one document"):
        split_documents(read(make_data_file(texts)), 0.5)


def test_a_state_or_a_file_of_a_mixture_keeps_something_to_train(
    make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": text, "state": "many"} for text in TEXTS]
    _, held_out = split_documents(read(make_data_file(TEXTS)), 0.1)
    lone = texts_of(held_out)[0]
    rows = [{**row, "state": "lone"} if row["text"] == lone else row for row in rows]
    path = tmp_path / "states.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing to train of the state 'lone'"):
        split_documents(read(path), 0.1)
    small = make_data_file([lone], name="small.jsonl")
    mixture = f"{make_data_file(TEXTS)}:0.9,{small}:0.1"
    with pytest.raises(ConfigError, match=r"nothing to train of .*small\.jsonl"):
        split_documents(read(mixture), 0.1)


def test_a_file_kept_aside_is_read_as_that_of_training_is(
    make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = DataConfig(data_file=str(make_data_file(TEXTS[:50])), sft_split="train[:10]")
    trained = read_documents(config, TOKENIZER)
    held = make_data_file(TEXTS[45:60] + TEXTS[3:5], name="held.jsonl")
    found = read_held_out(config, f"{held}:0.2", TOKENIZER, trained)
    assert texts_of(found) == TEXTS[45:60] + TEXTS[3:5] and found.shares is None
    notes = [note for note in found.report.notes if "--val_file" in note]
    assert notes == [
        f"2 documents of --val_file are in --data_file too, and trained, the first at {held}:16"
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, texts in (("train.jsonl", TEXTS[:5]), ("validation.jsonl", TEXTS[5:8])):
        make_data_file(texts, name=f"folder/{name}")
    assert texts_of(read_held_out(config, str(folder), TOKENIZER, trained)) == TEXTS[5:8]


def test_states_that_are_not_trained_cannot_be_evaluated(
    make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "states.jsonl"
    path.write_text('{"text": "a text", "state": "poet"}\n{"text": "plain"}\n', encoding="utf-8")
    config = DataConfig(data_file=str(make_data_file(TEXTS[:5])))
    with pytest.raises(ConfigError, match=r"--val_file .* has rows for the state 'poet'"):
        read_held_out(config, str(path), TOKENIZER, read_documents(config, TOKENIZER))
    with pytest.raises(ConfigError, match="--val_file: there is no file none"):
        read_held_out(config, "none", TOKENIZER, read_documents(config, TOKENIZER))
