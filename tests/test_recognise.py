"""A file that cannot be used is called what it is, with what to do."""

import gzip
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.recognise import recognise

Cli = Callable[..., SimpleNamespace]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>rwkv at main</title>"


def make_zip(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "text")


def make_numpy(path: Path, save: Callable[..., None]) -> None:
    with open(path, "wb") as file:
        save(file, np.zeros(3))


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


def make_script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


# name of the case -> how a file of it is made, what is said of it, and a word of the advice
STRANGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "lfs": (lambda p: p.write_text(POINTER), "a pointer of git-lfs", "git lfs pull"),
    "annex": (lambda p: p.write_text("/annex/objects/SHA256E-s1--a.pth\n"), "git-annex", "get"),
    "html": (lambda p: p.write_text(PAGE), "a web page", "/resolve/"),
    "rows": (lambda p: p.write_text('{"text": "a"}\n'), "a text file of JSON", "as the data"),
    "nested rows": (lambda p: p.write_text('{"text":{}}\n'), "a text file of JSON", "as the data"),
    "text": (lambda p: p.write_text("once upon a time\n字"), "a text file", "as the data"),
    "empty": (lambda p: p.write_bytes(b""), "an empty file", "again"),
    "zeros": (lambda p: p.write_bytes(bytes(5000)), "all zeros", "again"),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + bytes(100)), "a GGUF file", "converted from"),
    "ggml": (lambda p: p.write_bytes(b"fmgg" + bytes(100)), "rwkv.cpp", "converted from"),
    "zip": (lambda p: make_zip(p, "readme.txt"), "a zip archive and no", "unpack"),
    "zipped model": (lambda p: make_zip(p, "a/model.pth"), "a zip archive and no", "unpack"),
    "npz": (lambda p: make_numpy(p, np.savez), "a .npz archive", "torch.save"),
    "npy": (lambda p: make_numpy(p, np.save), "a numpy array", ".npy"),
    "script": (make_script, "a TorchScript program", "state_dict"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "a Python pickle", "torch.save"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 100)), "gzip", "unpack"),
    "tar": (make_tar, "a tar archive", "unpack"),
    "pdf": (lambda p: p.write_bytes(b"%PDF-1.7\n"), "a PDF document", "another file"),
    "parquet": (lambda p: p.write_bytes(b"PAR1" + bytes(90)), "a parquet file", ".parquet"),
    "folder": (lambda p: p.mkdir(), "a folder", "give a file"),
    "noise": (lambda p: p.write_bytes(bytes(range(200, 0, -1)) * 9), "damaged, or of", "again"),
    "module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "Linear", "model.state_dict()"),
    "old module": (
        lambda p: torch.save(torch.nn.Linear(2, 2), p, _use_new_zipfile_serialization=False),
        "would run code of torch.nn.modules.linear.Linear",
        "model.state_dict()",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_weights_that_are_none_are_called_what_they_are(
    case: str, model_file: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    make, what, advice = STRANGE[case]
    path = tmp_path / "given.pth"
    make(path)
    lines: list[list[object]] = [
        ["train", path, data_file, "--proj_dir", tmp_path / "run"],
        ["generate", "--load_model", path, "--prompt", "a"],
        ["merge", "--base_model", path, "--adapter", path, "--output", tmp_path / "m.pth"],
    ]
    if case != "folder":
        run = ["--proj_dir", tmp_path / "run"]
        lines.append(["train", model_file, data_file, "--load_adapter", path, *run])
        lines.append(["generate", "--load_model", model_file, "--state", path, "--prompt", "a"])
        lines.append(["inspect", path])
    for line in lines:
        done = cli(*line)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert str(path) in done.err and what in done.err and advice in done.err, done.err
    assert not (tmp_path / "run").exists() and not (tmp_path / "m.pth").exists()


# what data may be or is refused for further on, and what is said of weights alone
MAYBE_DATA = {"rows", "nested rows", "text", "empty", "zeros", "noise", "folder"}
MAYBE_DATA |= {"module", "old module"}


@pytest.mark.parametrize("case", [case for case in STRANGE if case not in MAYBE_DATA])
@pytest.mark.parametrize("has_own_ending", [False, True])
def test_data_that_is_none_is_called_what_it_is(
    case: str, has_own_ending: bool, model_file: Path, tmp_path: Path, cli: Cli
) -> None:
    make, what, advice = STRANGE[case]
    path = tmp_path / "given.jsonl"
    make(path)
    if has_own_ending and case != "parquet":
        path = path.rename(tmp_path / f"given.{recognise(path).name}")
    for line in (["train", model_file, path], ["data", path]):
        done = cli(*line)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert str(path) in done.err and what in done.err and advice in done.err, done.err


def test_swapped_arguments_are_told(
    model_file: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    write_weights(tmp_path / "m.safetensors", read_weights(model_file))
    for model in (model_file, tmp_path / "m.safetensors"):
        done = cli("train", data_file, model)
        assert done.code == 2 and "rwkv-peft train model.pth data.jsonl" in done.err
    pair = tmp_path / "pair"
    for ending in (".bin", ".idx"):
        pair.with_suffix(ending).write_text(POINTER)
    assert "a pointer of git-lfs" in cli("data", pair).err


def test_the_name_of_the_other_format_is_told(model_file: Path, tmp_path: Path, cli: Cli) -> None:
    write_weights(tmp_path / "m.safetensors", read_weights(model_file))
    (tmp_path / "m.safetensors").rename(tmp_path / "one.pth")
    model_file.rename(tmp_path / "two.safetensors")
    for name, what, right in (
        ("one.pth", "a safetensors file", "one.safetensors"),
        ("two.safetensors", "a file of torch.save", "two.pth"),
    ):
        done = cli("inspect", tmp_path / name)
        assert done.code == 2 and f"is {what} under a wrong name: rename it to {right}" in done.err


@pytest.mark.parametrize("ending", [".crdownload", ".part", ".aria2", ".DOWNLOAD"])
def test_a_download_that_is_not_finished_is_told(
    ending: str, model_file: Path, data_file: Path, cli: Cli
) -> None:
    part = model_file.rename(f"{model_file}{ending}")
    assert "is an unfinished download: let it finish" in cli("inspect", part).err
    rows = data_file.rename(f"{data_file}{ending}")
    assert "is an unfinished download: let it finish" in cli("data", rows).err


def test_an_adapter_whose_files_are_pointers_is_told(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_text(POINTER)
    assert "adapter_model.safetensors is a pointer of git-lfs" in cli("inspect", folder).err
    (folder / "adapter_config.json").write_text(PAGE)
    assert "adapter_config.json is a web page" in cli("inspect", folder).err


def test_files_of_every_size_that_are_cut_are_recognised(model_file: Path, tmp_path: Path) -> None:
    path, raw = tmp_path / "x", model_file.read_bytes()
    write_weights(tmp_path / "m.safetensors", read_weights(model_file))
    other = (tmp_path / "m.safetensors").read_bytes()
    for size in (*range(80), 500, 5000):
        for content in (raw, other):
            path.write_bytes(content[:size])
            assert recognise(path).name not in ("torch", "safetensors")
