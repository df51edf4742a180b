"""Words of a command line that belong to no flag, wherever they stand, and words that do."""

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest

from rwkv_peft.cli.arguments import SWITCHES, join_arguments, split_arguments
from rwkv_peft.cli.generate import GenerateOptions
from rwkv_peft.cli.main import COMMANDS
from rwkv_peft.cli.parse import parse
from rwkv_peft.cli.train import TrainOptions
from rwkv_peft.errors import ConfigError

Cli = Callable[..., SimpleNamespace]


@pytest.mark.parametrize(
    "line",
    [
        ["m.pth", "d.jsonl", "--lr_init", "1e-4", "--dry_run"],
        ["--lr_init", "1e-4", "m.pth", "d.jsonl", "--dry_run"],
        ["m.pth", "--lr_init=1e-4", "d.jsonl", "--dry_run"],
        ["--dry_run", "m.pth", "d.jsonl", "--lr-init", "1e-4"],
        ["--dry_run", "True", "m.pth", "--lr_init", "1e-4", "d.jsonl"],
        ["--load_model", "m.pth", "d.jsonl", "--lr_init", "1e-4", "--dry_run"],
        ["d.jsonl", "--lr_init", "1e-4", "--dry_run", "--load_model", "m.pth"],
        ["m.pth", "--data_file", "d.jsonl", "--lr_init", "1e-4", "--dry_run"],
    ],
)
def test_files_may_stand_before_behind_and_between_the_flags(line: list[str]) -> None:
    given = parse(TrainOptions, line, command="train", positional=("load_model", "data_file"))
    assert (given.load_model, given.data_file) == ("m.pth", "d.jsonl")
    assert given.lr_init == 1e-4 and given.dry_run


def test_json_that_a_shell_has_split_ends_with_its_last_bracket() -> None:
    line = ["--peft_config", "{r:", "8,", "x:", "{a: 1}}", "m.pth", "--weights", "[0.5,", "1]", "d"]
    loose, flags = split_arguments(line)
    assert loose == ["m.pth", "d"]
    assert flags == [("peft_config", ["{r: 8, x: {a: 1}}"]), ("weights", ["[0.5, 1]"])]


@pytest.mark.parametrize("text", ["-", "- item", "-x y", "--- title", "-1", "—", "{a", "a b"])
def test_a_value_may_begin_with_anything(text: str) -> None:
    for line in (["--prompt", text], [f"--prompt={text}"]):
        given = parse(GenerateOptions, ["m", *line], command="generate", positional=("load_model",))
        assert (given.load_model, given.prompt) == ("m", text)
    assert parse(GenerateOptions, ["--prompt=--x"], command="generate").prompt == "--x"
    loose, flags = split_arguments(["a", "--prompt", text, "--wandb=--p"])
    assert split_arguments(join_arguments(loose, flags)) == (loose, flags)


@pytest.mark.parametrize("dash", ["—", "–", "––", "−", "‐", "—-"])
def test_a_dash_of_print_is_told_from_that_of_a_flag(dash: str, cli: Cli) -> None:
    done = cli("train", "m.pth", "d.jsonl", f"{dash}lr_init", "1e-4")
    wanted = f"error: '{dash}lr_init' begins with a dash of print: write --lr_init\n"
    assert (done.code, done.err) == (2, wanted)


def test_too_many_words_are_named_with_what_the_command_takes(cli: Cli) -> None:
    done = cli("generate", "m.pth", "--user", "What", "is", "this")
    assert "'is' is one argument too many: rwkv-peft generate takes load_model" in done.err
    assert "quotes" in done.err
    assert cli("doctor", "x").err == (
        "error: 'x' is one argument too many: rwkv-peft doctor takes flags alone: --name value\n"
    )
    assert cli("train", "m", "d", "--lr_init").err == (
        "error: --lr_init: got nothing, allowed is a number\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_switch_may_stand_without_a_word(command: str) -> None:
    options = getattr(import_module(f"rwkv_peft.cli.{command}"), f"{command.capitalize()}Options")
    hints = get_type_hints(options)
    assert {f.name for f in fields(options) if hints[f.name] is bool} <= SWITCHES


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("D:\\models\\x.pth", "/mnt/d/models/x.pth"),
        ("c:/a b/模型.pth", "/mnt/c/a b/模型.pth"),
        ("D:modelsx.pth", "/mnt/d/…"),
        ("\\\\wsl.localhost\\Ubuntu\\home\\me\\x.pth", "/home/me/x.pth"),
        ("\\\\wsl$\\Ubuntu\\home", "/home"),
    ],
)
def test_a_path_of_windows_is_answered_with_what_it_is_in_wsl(
    written: str, meant: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    for flag in ("load_model", "data_file", "proj_dir"):
        done = cli("train", f"--{flag}", written)
        assert done.err == (
            f"error: --{flag} {written}: a path of Windows, which is {meant} in WSL: write that\n"
        )
    assert cli("chat", written).err.startswith("error: --load_model ")
    Path("c:y.pth").touch()
    assert "Windows" not in cli("chat", "c:y.pth").err
    assert "Windows" not in cli("generate", "m", "--prompt", "A:\\b").err


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_yaml_file_of_windows_is_read(start: bytes, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(start + b"load_model: no.pth\r\ndata_file: 'C:\\d.jsonl'\r\n")
    assert "a path of Windows, which is /mnt/c/d.jsonl" in cli("train", "--config", path).err
    path.write_bytes(b'load_model: "C:\\models"\n')
    assert "a backslash is no part of a path" in cli("train", "--config", path).err
    path.write_bytes("load_model: 模型.pth".encode("gbk"))
    assert cli("train", "--config", path).err == (
        f"error: {path} cannot be read as YAML: it is not in UTF-8: save it as UTF-8\n"
    )


def test_a_value_that_follows_a_switch_is_refused_as_its_own() -> None:
    with pytest.raises(ConfigError, match="--dry_run: got maybe, allowed is true or false"):
        parse(TrainOptions, ["--dry_run", "maybe"], command="train")
