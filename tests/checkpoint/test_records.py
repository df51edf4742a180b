import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.checkpoint.records import find_records, require_sums
from rwkv_peft.errors import CheckpointError


def rewrite(path: Path, changed: dict[str, bytes]) -> None:
    """Writes a valid zip file anew, with other content in some records; empty for none."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in contents.items():
            new.writestr(name, changed.get(name.partition("/")[2], content))


def flip(path: Path, name: str) -> None:
    """Changes one bit in the middle of a record."""
    record = find_records(path)[name]
    with open(path, "r+b") as file:
        file.seek(place := record.start + record.size // 2)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("change", ["empty", "shorter by one", "half", "longer by one"])
def test_a_record_of_another_length_is_refused(change: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(9), "b": torch.ones(7)}, tmp_path / "x.pth")
    content = torch.ones(9).numpy().tobytes()
    other = {
        "empty": b"",
        "shorter by one": content[:-1],
        "half": content[:18],
        "longer by one": content + b"\0",
    }
    rewrite(tmp_path / "x.pth", {"data/0": other[change]})
    # each is a valid zip file, with right checksums
    require_sums(tmp_path / "x.pth")
    size = len(other[change])
    with pytest.raises(CheckpointError, match=f"record data/0 has {size:,} bytes, 36 are needed"):
        read_weights(tmp_path / "x.pth")


def test_every_record_has_its_sum(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({f"x{i}": torch.randn(50) for i in range(5)}, path)
    whole = path.read_bytes()
    require_sums(path)
    for name in find_records(path):
        path.write_bytes(whole)
        flip(path, name)
        with pytest.raises(CheckpointError, match=f"{name} has another checksum"):
            require_sums(path)


def test_what_torch_saves_and_this_program_writes_has_right_sums(
    model_file: Path, tmp_path: Path
) -> None:
    torch.save(read_weights(model_file), tmp_path / "torch.pth")
    torch.save(read_weights(model_file), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    require_sums(model_file, tmp_path / "torch.pth", tmp_path / "old.pth", tmp_path)


def test_a_file_that_another_zip_program_wrote_is_read(model_file: Path, tmp_path: Path) -> None:
    wanted = {name: x.clone() for name, x in read_weights(model_file).items()}
    random.seed(0)
    with zipfile.ZipFile(model_file) as old, zipfile.ZipFile(tmp_path / "x.pth", "w") as new:
        # in another order, and wherever the records fall
        for name in random.sample(old.namelist(), len(old.namelist())):
            new.writestr(name, old.read(name))
    found = read_weights(tmp_path / "x.pth")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(x.data_ptr() % x.dtype.itemsize == 0 for x in found.values())


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(9)}, tmp_path / "x.pth")
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "x.pth", "a") as file,
    ):
        file.writestr("x/data/0", torch.zeros(9).numpy().tobytes())
    with pytest.raises(CheckpointError, match="two records data/0"):
        read_weights(tmp_path / "x.pth")


def test_wrong_sums_end_commands_unless_they_are_told_not_to_look(
    model_file: Path, data_file: Path, tmp_path: Path, cli: Callable[..., SimpleNamespace]
) -> None:
    state = {f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)}
    torch.save(state, tmp_path / "state.pth")
    flip(model_file, "data/9")
    merge = ("merge", "--base_model", model_file, "--adapter", tmp_path / "state.pth", "--output")
    train = ("train", model_file, data_file, "--epoch_count", 0, "--proj_dir", tmp_path / "out")
    train += ("--peft", "state", "--data_cache", tmp_path / "cache", "--ctx_len", 32)
    for line in (("inspect", model_file), (*merge, tmp_path / "m.pth"), train):
        done = cli(*line)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "data/9 has another checksum" in done.err
        assert not (tmp_path / "m.pth").exists()
        assert not (tmp_path / "out" / "rwkv-0.pth").exists()
    for line in ((*merge, tmp_path / "m.pth"), train):
        assert cli(*line, "--check_files", 0).code == 0
    flip(model_file, "data/9")
    flip(tmp_path / "state.pth", "data/0")
    done = cli(*merge, tmp_path / "n.pth")
    assert done.code == 2
    assert "state.pth is damaged: data/0 has another checksum" in done.err
    flip(tmp_path / "state.pth", "data/0")
    assert json.loads(cli("inspect", model_file, "--json").out)["odd"] is not None
    assert rwkv_peft.load_model(model_file).model_config.n_layer == 2


def test_names_in_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(9)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("a\nb\x1b[2J", b"")
    with pytest.raises(CheckpointError, match=r"two records a\\nb\\x1b\[2J"):
        read_weights(path)
    torch.save({"a\n\x1b[2J": 5}, path)
    with pytest.raises(CheckpointError, match=r"\('a\\n\\x1b\[2J' …\)"):
        read_weights(path)
