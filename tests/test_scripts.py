"""The shell scripts and merge scripts that users of RWKV-PEFT know."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.cli import environment
from rwkv_peft.cli.legacy.merge import translate_merge
from rwkv_peft.errors import ConfigError
from tests.checkpoint.old_files import ALPHA, old_pissa, old_run
from tests.checkpoint.test_merge import make_state

ROOT = Path(__file__).parents[1]
Cli = Callable[..., SimpleNamespace]
# script -> what it leaves of epoch 0
SAVED = {
    "lora": {"rwkv-0.pth", "rwkv-0-adapter"},
    "pissa": {"rwkv-0.pth", "rwkv-0-adapter"},
    "miss": {"rwkv-0.pth", "rwkv-0-adapter"},
    "sft": {"rwkv-0.pth", "rwkv-0-adapter"},
    "infctx": {"rwkv-0.pth", "rwkv-0-adapter"},
    "state": {"rwkv-0.pth"},
    "full": {"rwkv-0.pth"},
}


def settings(folder: Path, model: Path, **more: str) -> dict[str, str]:
    rows = [
        {"text": f"row {i} " * 20, "query": f"{i}?", "response": f"{i}! " * 9} for i in range(9)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = {"load_model": str(model), "data_file": str(data), "proj_dir": str(folder / "run")}
    return {**own, "micro_bsz": "2", "ctx_len": "32", "epoch_steps": "2", **more}


def arguments(script: Path, folder: Path, variables: dict[str, str], *more: str) -> list[str]:
    """What a script calls, found by letting it call a program that writes its arguments."""
    stub = folder / "stub"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {folder}/called\n', encoding="utf-8")
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), **variables}
    # where it is installed, the strictest of the shells that are called sh
    shell = shutil.which("dash") or "sh"
    subprocess.run([shell, str(script), *more], check=True, cwd=folder, env=environment)
    words = (folder / "called").read_bytes().decode().split("\0")[:-1]
    assert Path(words[0]).resolve() == ROOT / "train.py"
    return words[1:]


def test_every_script_is_known_to_these_tests() -> None:
    assert {p.name for p in (ROOT / "scripts").iterdir()} == {f"run_{n}.sh" for n in SAVED}


@pytest.mark.parametrize("name", SAVED)
def test_a_script_runs_two_steps_from_another_folder(
    name: str, model_file: Path, tmp_path: Path, cli: Cli
) -> None:
    script = ROOT / "scripts" / f"run_{name}.sh"
    config = {} if name in ("state", "full") else {"peft_config": '{"r": 4}'}
    given = settings(tmp_path, model_file, n_layer="2", n_embd="128", **config)
    done = cli("train", *arguments(script, tmp_path, given, "--accelerator", "cpu"))
    assert done.code == 0, done.err
    files = {p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("rwkv-")}
    assert files == SAVED[name]
    assert len((tmp_path / "run" / "loss_data.jsonl").read_text().splitlines()) == 2
    saved, base = read_weights(tmp_path / "run" / "rwkv-0.pth"), read_weights(model_file)
    assert (set(saved) == set(base)) == (name != "state")
    assert any(not torch.equal(x, base.get(n, torch.zeros_like(x))) for n, x in saved.items())


@pytest.mark.parametrize("name", SAVED)
def test_a_script_has_defaults_that_training_takes(
    name: str, model_file: Path, tmp_path: Path, cli: Cli
) -> None:
    words = arguments(ROOT / "scripts" / f"run_{name}.sh", tmp_path, {})
    given = dict(zip(words[::2], words[1::2], strict=False))
    assert given["--load_model"] == "model.pth" and given["--proj_dir"] == f"out/{name}"
    settings(tmp_path, model_file)
    more = ["--load_model", str(model_file), "--data_file", str(tmp_path / "rows.jsonl")]
    more += ["--proj_dir", str(tmp_path / "run"), "--accelerator", "cpu"]
    wrong = cli("train", *words, *more, "--n_layer", 3)
    assert wrong.code == 2 and wrong.err.startswith("error: --n_layer 3 contradicts "), wrong.err


def test_a_script_trains_with_the_clone_it_lies_in(model_file: Path, tmp_path: Path) -> None:
    given = settings(tmp_path, model_file, peft_config='{"r": 4}', PYTHON=sys.executable)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | given
    script = os.path.relpath(ROOT / "scripts" / "run_lora.sh", tmp_path)
    command = ["sh", script, "--accelerator", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "rwkv-0.pth").exists()


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_a_script_without_an_environment_says_what_to_type(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    # a Python that has none of the packages
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -E -s -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    for path in (ROOT / "scripts").iterdir():
        done = subprocess.run(
            [shell, str(path)],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHON": str(bare)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "has no package" in done.stderr and "type " in done.stderr, done.stderr


@pytest.mark.parametrize("has_environment", [True, False])
def test_what_to_type_depends_on_what_is_there(
    has_environment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    (tmp_path / "constraints.txt").write_text("")
    activate = tmp_path / ".venv" / "bin" / "activate"
    if has_environment:
        activate.parent.mkdir(parents=True)
        activate.write_text("")
    found = environment.describe_missing(ModuleNotFoundError(name="torch.nn"))
    make = ".venv/bin/pip install -c constraints.txt . && . .venv/bin/activate"
    wanted = f"type . {activate}" if has_environment else f"type cd {tmp_path} && python3 -m venv"
    assert wanted in found and (make in found) != has_environment
    assert environment.describe_missing(ModuleNotFoundError(name="wandb")) == ""
    monkeypatch.setattr(sys, "prefix", "/env")
    assert "type cd" in environment.describe_missing(ModuleNotFoundError(name="rich"))


# script and kind of adapter -> arguments in the forms of the older program
OLD_CALLS = {
    ("merge.py", "lora"): "--type lora --base_model BASE --lora_checkpoint ADAPTER --output OUTPUT "
    f"--lora_alpha {ALPHA} --lora_init none --quant none --device cuda",
    ("merge.py", "pissa"): "--type pissa --base_model BASE --lora_init INIT --lora_checkpoint "
    "ADAPTER --output OUTPUT --lora_alpha 16",
    (
        "merge.py",
        "disha",
    ): "--type disha --base_model BASE --lora_checkpoint ADAPTER --output OUTPUT",
    ("merge_lora.py", "lora with parts"): f"--use-gpu {ALPHA} BASE ADAPTER OUTPUT",
    ("merge_pissa.py", "pissa"): "BASE INIT ADAPTER OUTPUT",
    ("merge_disha.py", "disha"): "--base_model BASE --peft_checkpoint ADAPTER --output OUTPUT "
    "--device cpu",
    ("merge_bone.py", "bat"): "--base_model BASE --lora_checkpoint ADAPTER --output OUTPUT",
}


@pytest.mark.parametrize("form", OLD_CALLS, ids=" ".join)
def test_the_arguments_of_an_old_merge_script_give_its_file(
    form: tuple[str, str], make_model_file: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    assert (ROOT / "merge" / form[0]).is_file()
    files = {"BASE": make_model_file(dtype=torch.float32), "OUTPUT": tmp_path / "merged.pth"}
    if form[1] == "pissa":
        files["ADAPTER"], files["INIT"], by_hand = old_pissa(tmp_path, files["BASE"])
    else:
        files["ADAPTER"], by_hand = old_run(tmp_path, files["BASE"], form[1])
    done = cli("merge", *(files.get(word, word) for word in OLD_CALLS[form].split()))
    assert done.code == 0, done.err
    wanted, found = read_weights(by_hand), read_weights(files["OUTPUT"])
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["merge", "merge_lora", "merge_state"])
def test_a_merge_script_runs_from_another_folder(
    name: str, make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_file()
    adapter, _ = old_run(tmp_path, base, "lora")
    state = make_state(base, tmp_path / "state.pth")
    calls = {
        "merge": f"--type lora --base_model {base} --lora_checkpoint {adapter} --output merged.pth",
        "merge_lora": f"{ALPHA} {base} {adapter} merged.pth",
        "merge_state": f"--base_model {base} --state_checkpoint {state} --output merged.pth",
    }
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "merge" / f"{name}.py"), *calls[name].split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    merged = read_weights(tmp_path / "merged.pth")
    if name == "merge_state":
        assert all(torch.equal(merged[n], x) for n, x in read_weights(state).items())
    else:
        alpha = ALPHA if name == "merge_lora" else 16
        rwkv_peft.merge(base, adapter, tmp_path / "ours.pth", lora_alpha=alpha)
        ours = read_weights(tmp_path / "ours.pth")
        assert all(torch.equal(merged[n], x) for n, x in ours.items())
    assert ("note: --lora_alpha 16, as this script has it" in done.stderr) == (name == "merge")


@pytest.mark.parametrize(
    ("line", "today"),
    [
        ("8 b.pth l.pth o.pth", "--lora_alpha 8 --base_model b.pth --adapter l.pth --output o.pth"),
        ("b.pth i.pth l.pth o.pth", "--base_model b.pth --pissa_init i.pth --adapter l.pth "
         "--output o.pth"),
        ("b.pth folder o.pth", "--base_model b.pth --adapter folder --output o.pth"),
        ("--type bone --lora_alpha 16 --lora_checkpoint x.pth", "--adapter x.pth"),
        ("--type lora --lora_checkpoint folder", "--adapter folder"),
        ("--type lora --lora_checkpoint x.pth", "--adapter x.pth --lora_alpha 16"),
        ("--base_model b --adapter a --weights [0.5,1] --dtype fp16",
         "--base_model b --adapter a --weights [0.5,1] --dtype fp16"),
        ("--help", "--help"),
    ],
)  # fmt: skip
def test_forms_of_old_merge_lines(line: str, today: str) -> None:
    assert " ".join(translate_merge(line.split()).arguments) == today


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--type lisa", "--type lisa: there are lora, pissa, disha, bone, miss, state"),
    ],
)
def test_an_old_merge_line_that_cannot_be_honoured_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate_merge(line.split())
