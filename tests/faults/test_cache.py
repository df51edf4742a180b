"""Prepared data that is not as it was written is never trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.data.encode import Chunk
from rwkv_peft.data.store import Store, open_store
from rwkv_peft.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(np.dtype(np.uint16), tmp_path)
    for weights in (None, [1.0, 0.0, 1.0], [0.5, 1.0, 1.0]):
        chunk = Chunk(
            tokens=np.array([1, 2, 3], dtype=np.uint16),
            sizes=[1, 2],
            lines=[1, 2],
            digests=[5, 6],
            states=["", "a"],
            weights=None if weights is None else np.array(weights),
            num_rows=2,
            num_bytes=10,
        )
        store.add(chunk, 0, "made")
    store.finish()
    store.close()
    return tmp_path


def test_a_folder_opens_as_it_was_written(folder: Path) -> None:
    arrays, facts = open_store(folder)
    assert arrays["tokens"].tolist() == [1, 2, 3] * 3
    assert arrays["weights"].tolist() == [1, 1, 1, 1, 0, 1, 0.5, 1, 1]
    assert facts["num_rows"] == 6 and facts["states"] == ["", "a"]


def test_every_byte_of_every_file_is_checked(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        changed = [raw[:-1], raw + b"\0", raw + b"\0" * 8]
        changed += [raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :] for i in range(len(raw))]
        for content in (c for c in changed if c != raw):
            file.write_bytes(content)
            with pytest.raises(DataError, match="is damaged: delete it"):
                open_store(folder)
        file.write_bytes(raw)
    open_store(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"checksum": 1}', "[" * 100_000])
def test_facts_of_any_other_form_are_refused(text: str, folder: Path) -> None:
    (folder / "facts.json").write_text(text)
    with pytest.raises(DataError, match="is damaged: delete it"):
        open_store(folder)


def test_facts_of_another_folder_are_refused(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    facts["num_rows"] += 1
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"facts\.json is not as it was written"):
        open_store(folder)
