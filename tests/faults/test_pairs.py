"""A binidx pair is the old or the new at every moment, and two files of different data are told."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.pairs import write_pair
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import CheckpointError, ConfigError, DataError
from tests.test_writing import MANY, interrupted, run_in_processes

TOKENIZER = Tokenizer()
# of one total, so that no count of tokens tells them apart
OLD, NEW = [[11, 12, 0], [13, 0]], [[21, 0], [22, 23, 0]]


def documents_of(ids: list[list[int]]) -> Documents:
    return Documents(
        paths=("made",),
        tokens=np.array([i for row in ids for i in row], dtype=np.uint16),
        starts=np.cumsum([0, *map(len, ids)]),
        lines=np.arange(len(ids)) + 1,
        sources=np.zeros(len(ids), dtype=np.uint8),
    )


def content_of(path: Path) -> list[list[int]]:
    found = read_documents(DataConfig(data_file=str(path), data_type="binidx"), TOKENIZER)
    return [x.tolist() for x in np.split(found.tokens, found.starts[1:-1])]


def reads_as_others_do(path: Path) -> bool:
    """Whether a program that knows no marks finds a pair, and its index is that of its tokens."""
    index = path.with_suffix(".idx")
    if not (index.exists() and path.with_suffix(".bin").exists()):
        return True
    sizes = np.fromfile(index, "<i4", offset=34, count=2).tolist()
    tokens = np.fromfile(path.with_suffix(".bin"), "<u2").tolist()
    pairs = [(list(map(len, x)), [i for row in x for i in row]) for x in (OLD, NEW)]
    return (sizes, tokens) in pairs


def kill_at_every_call(path: Path) -> None:
    for at in range(MANY * 2):
        write_pair(path, documents_of(OLD))
        assert sorted(os.listdir(path.parent)) == ["t.bin", "t.idx"], at
        if (child := os.fork()) == 0:
            with interrupted(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                write_pair(path, documents_of(NEW))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert reads_as_others_do(path), at
        assert content_of(path) in (OLD, NEW), at
        if status == 0:
            assert content_of(path) == NEW
            return
    raise AssertionError(f"a pair makes {2 * MANY} calls or more")


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_pair_that_is_killed_at_any_call_is_the_old_or_the_new(tmp_path: Path) -> None:
    code = "import tests.faults.test_pairs as pairs; "
    run_in_processes(f"{code}pairs.kill_at_every_call(Path({str(tmp_path / 't')!r}))")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_pair_of_which_a_call_fails_is_the_old_or_the_new(number: int, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    path, failed = tmp_path / "t", True
    for at in range(MANY * 2):
        write_pair(path, documents_of(OLD))
        with interrupted(at, fail) as made:
            try:
                write_pair(path, documents_of(NEW))
                failed = False
            except (CheckpointError, DataError, OSError) as error:
                failed, text = True, str(error)
        found = content_of(path)
        assert found in (OLD, NEW), made
        if failed and "is untouched" in text:
            assert found == OLD, made
        if len(made) <= at:
            assert not failed and found == NEW
            return
    pytest.fail("a pair makes too many calls")


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    write_pair(tmp_path / "old", documents_of(OLD))
    write_pair(tmp_path / "new", documents_of(NEW))
    yield tmp_path / "old", tmp_path / "new"


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_files_of_two_pairs_are_told_though_their_sizes_agree(
    ending: str, pairs: tuple[Path, Path]
) -> None:
    old, new = pairs
    new.with_suffix(ending).replace(old.with_suffix(ending))
    with pytest.raises(DataError, match="are of different data"):
        content_of(old)


@pytest.mark.parametrize("change", [b"\x01\x00", None])
def test_a_file_of_tokens_has_exactly_those_of_its_index(
    change: bytes | None, pairs: tuple[Path, Path]
) -> None:
    file = pairs[0].with_suffix(".bin")
    raw = file.read_bytes()
    file.write_bytes(raw + change if change else raw[:-2])
    with pytest.raises(DataError, match=r"old\.bin has \d tokens, but .*old\.idx names 5"):
        content_of(pairs[0])


def test_a_pair_of_another_program_has_no_mark_and_opens(pairs: tuple[Path, Path]) -> None:
    index = pairs[0].with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-24])
    assert content_of(pairs[0]) == OLD


def test_a_pair_without_its_index_is_named(pairs: tuple[Path, Path]) -> None:
    pairs[0].with_suffix(".idx").unlink()
    with pytest.raises(ConfigError, match=r"a binidx pair needs .*old\.bin and .*old\.idx"):
        content_of(pairs[0].with_suffix(".bin"))


def test_a_large_file_is_told_by_any_of_its_parts(tmp_path: Path) -> None:
    ids = [[*range(1, 60_000), 0] for _ in range(6)]
    write_pair(tmp_path / "one", documents_of(ids))
    write_pair(tmp_path / "two", documents_of([row[::-1] for row in ids]))
    assert content_of(tmp_path / "one") == ids
    (tmp_path / "two.bin").replace(tmp_path / "one.bin")
    with pytest.raises(DataError, match="are of different data"):
        content_of(tmp_path / "one")
