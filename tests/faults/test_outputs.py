"""No command writes over what it reads, over what is no file, or over what is not its own."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.checkpoint.report import REPORT

Cli = Callable[..., SimpleNamespace]
COMMANDS = ("merge", "state", "convert", "old", "init", "prepare", "again")


class Files(SimpleNamespace):
    """A model, an adapter, a state and data, and the commands that read them."""

    model: Path
    adapter: Path
    state: Path
    data: Path
    folder: Path

    def command(self, name: str, output: Path) -> list[object]:
        pair = str(output).removesuffix(".bin").removesuffix(".idx")
        base = ["--base_model", self.model]
        prepare = ["data", "prepare", "--prepare_workers", 1, "--output", pair, "--data_file"]
        return {
            "merge": ["merge", *base, "--adapter", self.adapter, "--output", output],
            "state": ["merge", *base, "--adapter", self.state, "--output", output],
            "convert": ["convert", self.adapter, *base, "--to", "pth", "--output", output],
            "old": ["convert", self.state, *base, "--output", output],
            "init": ["init", output, "--n_layer", 1, "--n_embd", 64, "--vocab_size", 300],
            "prepare": [*prepare, self.data],
            "again": [*prepare, self.pair],
        }[name]

    def inputs(self, name: str) -> list[Path]:
        weights = self.adapter / "adapter_model.safetensors"
        return {
            "merge": [self.model, weights],
            "state": [self.model, self.state],
            "convert": [self.model, weights],
            "old": [self.model, self.state],
            "init": [],
            "prepare": [],
            "again": [self.pair.with_suffix(".bin")],
        }[name]


@pytest.fixture
def files(
    make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path, cli: Cli
) -> Iterator[Files]:
    from tests.checkpoint.test_merge import make_adapter, make_state

    model = make_model_file()
    adapter = make_adapter(model, tmp_path / "adapter", "lora", {"r": 4})
    state = make_state(model, tmp_path / "state.pth")
    line = ["data", "prepare", data_file, "--output", tmp_path / "pair", "--prepare_workers", 1]
    assert cli(*line).code == 0
    yield Files(
        model=model,
        adapter=adapter,
        state=state,
        data=data_file,
        pair=tmp_path / "pair",
        folder=tmp_path,
    )


def content_of(folder: Path) -> dict[str, object]:
    """What lies in a folder, without following links."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else os.lstat(path).st_mode
        for path in sorted(folder.rglob("*"))
    }


def require_refused(cli: Cli, folder: Path, message: str, *args: object) -> None:
    before = content_of(folder)
    done = cli(*args)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err
    assert content_of(folder) == before


def ending_of(name: str) -> str:
    return ".bin" if name in ("prepare", "again") else ".pth"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_is_never_an_output(name: str, files: Files, cli: Cli) -> None:
    for i, given in enumerate(files.inputs(name)):
        ending = given.suffix
        outputs = [given, given.parent / ".." / given.parent.name / given.name]
        for kind in ("link", "hard"):
            path = files.folder / f"{kind}{i}{ending}"
            path.symlink_to(given) if kind == "link" else os.link(given, path)
            outputs.append(path)
        for output in outputs:
            for more in ([], ["--overwrite", 1]):
                line = files.command(name, output)
                require_refused(cli, files.folder, "which is read", *line, *more)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_there_is_replaced_only_when_that_is_said(
    name: str, files: Files, cli: Cli
) -> None:
    output = files.folder / f"mine{ending_of(name)}"
    output.write_bytes(b"mine")
    line = files.command(name, output)
    require_refused(cli, files.folder, "exists: choose another name, or give", *line)
    done = cli(*line, "--overwrite", 1)
    assert done.code == 0, done.err
    assert output.read_bytes() != b"mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_regular_file_is_never_replaced(name: str, files: Files, cli: Cli) -> None:
    ending = ending_of(name)
    os.mkfifo(files.folder / f"fifo{ending}")
    (files.folder / f"device{ending}").symlink_to("/dev/null")
    (files.folder / f"folder{ending}").mkdir()
    for kind in ("fifo", "device", "folder"):
        line = files.command(name, files.folder / f"{kind}{ending}")
        require_refused(cli, files.folder, "no regular file", *line, "--overwrite", 1)


@pytest.mark.parametrize("name", ["merge", "state", "convert", "init"])
def test_an_ending_that_no_format_has_is_refused(name: str, files: Files, cli: Cli) -> None:
    for ending in (".gguf", ".st", ".pt", ".bin", ".PTH", ".pth.zip", ""):
        line = files.command(name, files.folder / f"x{ending}")
        require_refused(cli, files.folder, ".pth or .safetensors", *line)


def test_a_folder_is_not_named_like_a_file(files: Files, cli: Cli) -> None:
    line = ["convert", files.adapter, "--base_model", files.model, "--output"]
    for name in ("x.gguf", "x.pt", "x.bin"):
        require_refused(cli, files.folder, "a folder, or a file named", *line, files.folder / name)


@pytest.mark.parametrize("form", ["peft", "residual"])
def test_a_folder_with_files_of_the_user_is_refused(form: str, files: Files, cli: Cli) -> None:
    output = files.folder / "mine"
    (output / "adapter").mkdir(parents=True)
    inner = output / ("adapter" if form == "residual" else ".")
    (inner / "notes.txt").write_text("mine")
    line = ["convert", files.adapter, "--base_model", files.model, "--to", form]
    line += ["--output", output]
    require_refused(cli, files.folder, "choose another name", *line)
    require_refused(cli, files.folder, "holds other files too", *line, "--overwrite", 1)


def test_a_folder_of_ours_is_replaced_when_that_is_said(files: Files, cli: Cli) -> None:
    output = files.folder / "ours"
    line = ["convert", files.adapter, "--base_model", files.model, "--output", output]
    assert cli(*line).code == 0
    require_refused(cli, files.folder, "exists", *line)
    assert cli(*line, "--overwrite", 1).code == 0
    require_refused(cli, files.folder, "which is read", *line[:-1], files.adapter)


def test_a_report_that_is_no_report_stays(files: Files, cli: Cli) -> None:
    line = files.command("merge", files.folder / "merged.pth")
    (files.folder / REPORT).write_text(json.dumps({"my": "notes"}))
    require_refused(cli, files.folder, "the report", *line)
    (files.folder / REPORT).unlink()
    assert cli(*line).code == 0
    assert cli(*files.command("merge", files.folder / "again.pth")).code == 0


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_order_of_the_base_is_kept_in_both_formats(ending: str, files: Files, cli: Cli) -> None:
    weights = read_weights(files.model)
    names = random.Random(0).sample(list(weights), len(weights))
    shuffled = files.folder / f"shuffled{ending}"
    write_weights(shuffled, {name: weights[name] for name in names})
    assert list(read_weights(shuffled)) == names
    for other in (".pth", ".safetensors"):
        output = files.folder / f"merged{other}"
        line = ["merge", "--base_model", shuffled, "--adapter", files.adapter, "--output", output]
        assert cli(*line).code == 0
        assert list(read_weights(output)) == names
        if other == ".safetensors":
            from safetensors import safe_open

            with safe_open(output, "pt") as opened:
                assert list(opened.offset_keys()) == names
        else:
            assert list(torch.load(output)) == names
