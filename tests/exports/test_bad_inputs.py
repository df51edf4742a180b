"""Tables of what may be given to `export`, or opened, by mistake: one line, exit 2, nothing new."""

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.exports.formats import FORMATS
from tests.exports.test_refusals import refused, with_tensors

Cli = Callable[..., SimpleNamespace]
STATE = {f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)}


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def require_refused(cli: Cli, folder: Path, message: str, *args: object) -> None:
    """Sees that a command line is refused with a message, and leaves the folder as it was."""
    before = names_in(folder)
    assert message in refused(cli, *args)
    assert names_in(folder) == before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SOURCES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "empty.pth": (lambda model, path: path.touch(), "empty file"),
    "cut.pth": (lambda m, p: p.write_bytes(m.read_bytes()[: m.stat().st_size // 2]), "truncated"),
    "short.pth": (lambda m, p: p.write_bytes(m.read_bytes()[:-10]), "truncated"),
    "text.pth": (lambda model, path: path.write_text("User: hi\n"), "text file"),
    "missing.pth": (lambda model, path: None, "no file missing.pth"),
    "other.gguf": (lambda model, path: path.write_bytes(b"GGUF\3" + bytes(60)), "GGUF"),
    "other.bin": (
        lambda m, path: path.write_bytes(struct.pack("<6i", 0x67676D66, 101, 320, 128, 2, 1)),
        "rwkv.cpp",
    ),
    "other.rwkvq": (lambda model, path: path.write_bytes(b"RWKVQ"), "quantised"),
    "folder": (lambda model, path: path.mkdir(), "folder is a folder"),
    "llama": (
        lambda m, p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "llama"}')),
        "a model of the type 'llama'",
    ),
    "nan.pth": (
        lambda m, p: with_tensors(m, p, **{"blocks.1.att.w0": torch.full((1, 1, 128), torch.nan)}),
        "holds NaN or infinity",
    ),
    "more.pth": (lambda m, p: with_tensors(m, p, more=torch.ones(3)), "more.pth does not fit"),
    "adapter": (
        lambda m, p: (p.mkdir(), (p / "adapter_config.json").write_text("{}")),
        "adapter",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_no_model_is_told_in_one_line_and_nothing_is_written(
    cli: Cli, model_file: Path, here: Path, name: str
) -> None:
    make, message = SOURCES[name]
    make(model_file, here / name)
    for to in ("gguf", "pth", "hf"):
        ending = FORMATS[to].ending
        require_refused(cli, here, message, "export", name, "--to", to, "--output", f"o{ending}")


FLAGS: dict[str, tuple[tuple[object, ...], str]] = {
    "no such format": (("--to", "onnx"), "allowed is gguf, st"),
    "a matrix of 4 bits": (("--to", "gguf", "--dtype", "q4_k"), "--to gguf holds fp16"),
    "st in bf16": (("--to", "st", "--dtype", "bf16"), "--to st holds fp16"),
    "bin in bf16": (("--to", "bin", "--dtype", "bf16"), "--to bin holds fp16, fp32"),
    "hf in q8_0": (("--to", "hf", "--dtype", "q8_0"), "--to hf holds keep"),
    "fla in q8_0": (("--to", "hf-fla", "--dtype", "q8_0"), "--to hf-fla holds keep"),
    "pth in int8": (("--to", "pth", "--dtype", "int8"), "--to pth holds keep"),
    "a base of a model": (("--to", "gguf", "--base_model", "base.pth"), "is a whole model"),
    "a LoRA of a model": (("--to", "st", "--merge", "0"), "--merge 0 is for adapters"),
    "a template of none": (("--to", "st", "--template", "chat"), "--to st hold none"),
    "another ending": (("--to", "st", "--output", "o.gguf"), "ends in .st"),
    "a file's name for a folder": (("--to", "hf", "--output", "o.pth"), "a folder's name"),
    "in a file": (("--to", "st", "--output", "base.pth/o.st"), "is no folder"),
    "where nothing can be": (("--to", "st", "--output", "/proc/o.st"), "cannot"),
    "what is there": (("--to", "st", "--output", "there.st"), "exists"),
    "a folder that is there": (("--to", "hf", "--output", "there"), "other files too (mine)"),
    "the source": (("--to", "pth", "--output", "base.pth", "--overwrite", "1"), "is read"),
    "lines in a name": (("--to", "gguf", "--output", "a\nb.gguf"), "Modelfile cannot name it"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_what_cannot_be_done_is_told_in_one_line_and_nothing_is_written(
    cli: Cli, model_file: Path, here: Path, name: str
) -> None:
    (here / "there.st").write_text("mine")
    (here / "there").mkdir()
    (here / "there" / "mine").touch()
    flags, message = FLAGS[name]
    require_refused(cli, here, message, "export", "base.pth", *flags)


@pytest.mark.parametrize(
    "flags", [("--base_model", "base.pth"), ("--merge", "0"), ("--dtype", "bf16")]
)
@pytest.mark.parametrize(("to", "other"), [("st", "fp32"), ("pth", "fp16")])
def test_a_state_is_refused_flags_that_mean_nothing_for_it(
    cli: Cli, model_file: Path, here: Path, flags: tuple[str, str], to: str, other: str
) -> None:
    write_weights(here / "s.pth", STATE)
    for given in (flags, ("--dtype", other)):
        message = f"leave {'--merge 0' if given[0] == '--merge' else given[0]} out"
        require_refused(cli, here, message, "export", "s.pth", "--to", to, *given)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    ("given", "stem"),
    [
        ("rwkv7-g1d-1.5b-20260212-ctx8192.pth", "rwkv7-g1d-1.5b-20260212-ctx8192"),
        ("模型 目录/小 模型.pth", "小 模型"),
        ("a/../ABCd-Midi.pth", "a-b-cd-m-i-d-i"),
    ],
)
def test_any_name_is_exported_to_one_that_every_program_takes(
    cli: Cli, model_file: Path, here: Path, given: str, stem: str, to: str
) -> None:
    (here / "a").mkdir()
    (here / given).parent.mkdir(exist_ok=True)
    model_file.rename(here / given)
    assert cli("export", given, "--to", to, "--dtype", "fp16").code == 0
    output = here / f"{stem}-fp16{FORMATS[to].ending or f'-{to}'}"
    wanted = {n: x.half() for n, x in read_weights(here / given).items()}
    found = FORMATS[to].read(output)
    assert all(torch.equal(x.whole().half(), wanted[name]) for name, x in found.items())
    if not FORMATS[to].ending:
        # a folder's name keeps its dots when it is exported again
        assert cli("export", output.name, "--to", "pth").code == 0
        assert (here / f"{output.name}.pth").is_file()


SHARD = "model-00002-of-00011.safetensors"


def change_shard(folder: Path, content: bytes | None) -> str:
    """Cuts, empties or removes one of the files of weights."""
    path = folder / SHARD
    path.unlink() if content is None else path.write_bytes(content)
    return SHARD


def change_index(folder: Path, content: Any) -> str:
    path = folder / "model.safetensors.index.json"
    held = json.loads(path.read_text())
    if content == "another":
        content = held["weight_map"] | {"model.emb.weight": "nowhere.safetensors"}
    path.write_text(json.dumps(held | {"weight_map": content}))
    return "nowhere" if content and "model.emb.weight" in content else "folder"


FOLDERS: dict[str, Callable[[Path], str]] = {
    "lacks a shard": lambda folder: change_shard(folder, None),
    "has an empty shard": lambda folder: change_shard(folder, b""),
    "has a cut shard": lambda f: change_shard(f, (f / SHARD).read_bytes()[:-1000]),
    "has a shard without a header": lambda f: change_shard(f, (f / SHARD).read_bytes()[:50]),
    "has a text as a shard": lambda folder: change_shard(folder, b"<!DOCTYPE html>"),
    "names a file that is missing": lambda folder: change_index(folder, "another"),
    "names files by a list": lambda folder: change_index(folder, ["a"]),
    "names files by a text": lambda folder: change_index(folder, "x"),
    "names files by numbers": lambda folder: change_index(folder, {"a": 3}),
    "names none": lambda folder: change_index(folder, {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_shards_whose_files_are_wrong_is_told_by_the_file(
    cli: Cli,
    make_model_file: Callable[..., Path],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr("rwkv_peft.exports.hf.LARGEST_SHARD", 200_000)
    source = make_model_file(n_layer=3)
    assert cli("export", source, "--to", "hf", "--output", "folder").code == 0
    message = FOLDERS[name](here / "folder")
    require_refused(cli, here, message, "inspect", "folder")
    require_refused(cli, here, message, "export", "folder", "--to", "pth", "--output", "o.pth")


@pytest.mark.parametrize("to", ["hf", "hf-fla"])
def test_a_folder_whose_config_or_weights_are_another_model_s_is_refused(
    cli: Cli, model_file: Path, here: Path, to: str
) -> None:
    assert cli("export", model_file, "--to", to, "--output", "folder").code == 0
    config = here / "folder" / "config.json"
    good = json.loads(config.read_text())
    wrong = {
        "hidden_size": 256,
        "num_hidden_layers": 24,
        "vocab_size": 65536,
        "intermediate_size": 100,
        "head_dim": 32,
        "quantization_config": {"bits": 4},
        "model_type": "llama",
    }
    for key, value in wrong.items():
        config.write_text(json.dumps(good | {key: value}))
        word = {"quantization_config": "quantised", "model_type": "type 'llama'"}.get(key, key)
        require_refused(cli, here, word, "inspect", "folder")
    for text in ("", "null", "{", "[1]"):
        config.write_text(text)
        require_refused(cli, here, "config.json is damaged", "inspect", "folder")
    config.write_text(json.dumps(good))
    weights = here / "folder" / "model.safetensors"
    held = load_file(weights)
    key = next(name for name in held if name.endswith("ffn.value.weight"))
    export = ("export", "folder", "--to", "pth", "--output", "o.pth")
    for changed, word in (
        (held | {key: torch.zeros(64, 128)}, "folder does not fit"),
        ({n: x for n, x in held.items() if n != key}, "folder does not fit"),
        (held | {"other.weight": torch.zeros(3)}, "folder: other.weight"),
        (held | {key: torch.zeros(128, 512, dtype=torch.int8)}, "is int8"),
    ):
        save_file(changed, weights)
        require_refused(cli, here, word, *export)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_an_interrupted_export_leaves_nothing(
    make_model_file: Callable[..., Path], here: Path, to: str
) -> None:
    source = make_model_file(n_layer=12, vocab_size=65536, n_embd=256, dim_att=256, dim_ffn=1024)
    line = [sys.executable, "-m", "rwkv_peft.cli.main", "export", str(source), "--to", to]
    before = names_in(here)
    running = subprocess.Popen(
        [*line, "--output", f"out/o{FORMATS[to].ending}"], stderr=subprocess.PIPE, text=True
    )
    while running.poll() is None and not list(here.glob("out/.*")):
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert [name for name in names_in(here) if name != "out"] == before
