"""What people have may stand where a command takes a model, and is used as what it is."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.cli.given import find_kind
from rwkv_peft.cli.main import main
from rwkv_peft.models.initial import initial_weights
from tests.checkpoint.old_files import old_run
from tests.conftest import make_model_config

Cli = Callable[..., SimpleNamespace]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, and a run of each kind: merged, adapter, state, full."""
    folder, before = tmp_path_factory.mktemp("work"), Path.cwd()
    os.chdir(folder)
    generator = torch.Generator().manual_seed(1)
    weights = initial_weights(make_model_config(), 0)
    noisy = {n: x + 0.05 * torch.randn(x.shape, generator=generator) for n, x in weights.items()}
    write_weights("model.pth", noisy)
    turns = [[("user", f"{i}?"), ("assistant", f"yes {i}" * 3)] for i in range(6)]
    rows = [{"messages": [{"role": r, "content": x} for r, x in row]} for row in turns]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("own.jinja").write_text(TEMPLATE, encoding="utf-8")
    common = ["--epoch_count", "2", "--epoch_steps", "1", "--accelerator", "cpu"]
    common += ["--precision", "fp32", "--random_seed", "1"]
    for name, flags in {
        "merged": ["--template", "own.jinja", "--peft_config", '{"r": 2}', "--peft", "lora"],
        "adapter": ["--merge", "0", "--peft", "lora", "--peft_config", '{"r": 2}'],
        "state": ["--peft", "state"],
        "full": ["--peft", "none"],
    }.items():
        code = main(["train", "model.pth", "data.jsonl", "--proj_dir", name, *flags, *common])
        assert code == 0
    for to, output in {"hf": "hf", "hf-fla": "fla", "st": "model.st"}.items():
        assert main(["export", "model.pth", "--to", to, "--output", output]) == 0
    assert main(["export", "state", "--to", "st", "--output", "s.state"]) == 0
    yield folder
    os.chdir(before)


KINDS = {
    "model.pth": "model",
    "merged": "run",
    "merged/rwkv-1.pth": "model",
    "merged/rwkv-1-adapter": "adapter",
    "adapter": "run",
    "adapter/rwkv-1-adapter": "adapter",
    "state": "run",
    "state/rwkv-1.pth": "state",
    "full": "run",
    "data.jsonl": "other",
    "missing.pth": "other",
    "adapter/rwkv-1-adapter/adapter_model.safetensors": "adapter",
    "adapter/rwkv-1-adapter/adapter_config.json": "adapter",
    "adapter/config.yaml": "other",
    "hf": "model",
    "fla": "model",
    "model.st": "model",
    "s.state": "state",
}


def test_kinds_are_told_apart(work: Path) -> None:
    assert {path: find_kind(path) for path in KINDS} == KINDS


# first argument -> the same in flags
SAME = {
    "model.pth": ["--load_model", "model.pth"],
    "merged": ["--load_model", "merged/rwkv-1.pth"],
    "merged/rwkv-0-adapter": ["--load_model", "model.pth", "--adapter", "merged/rwkv-0-adapter"],
    "adapter": ["--load_model", "model.pth", "--adapter", "adapter/rwkv-1-adapter"],
    "state": ["--load_model", "model.pth", "--state", "state/rwkv-1.pth"],
    "state/rwkv-0.pth": ["--load_model", "model.pth", "--state", "state/rwkv-0.pth"],
    "full": ["--load_model", "full/rwkv-1.pth"],
}


@pytest.mark.parametrize("first", SAME)
def test_generate_and_eval_use_what_comes_first(first: str, work: Path, cli: Cli) -> None:
    more = ["--user", "3?", "--max_tokens", 6, "--temperature", 0, "--json"]
    given, named = cli("generate", first, *more), cli("generate", *SAME[first], *more)
    assert given.code == named.code == 0, given.err
    one, other = json.loads(given.out), json.loads(named.out)
    assert (one["prompt"], one["text"]) == (other["prompt"], other["text"])
    # a run is read in its own template
    assert one["prompt"].startswith("user> 3?" if first.startswith("merged") else "User: 3?")
    if first != "model.pth" and "full/" not in first:
        assert given.err.startswith(f"note: {first}") and SAME[first][-1] in given.err
    one = cli("eval", first, "data.jsonl", "--json").out
    other = cli("eval", *SAME[first], "--data_file", "data.jsonl", "--json").out
    assert json.loads(one)["loss_mask"] and one.partition("{")[2] == other.partition("{")[2]


@pytest.mark.parametrize("first", SAME)
def test_chat_uses_what_comes_first(
    first: str, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"3?\n")))
    done = cli("chat", first, "--max_tokens", 3, "--temperature", 0)
    assert done.code == 0, done.err


@pytest.mark.parametrize("first", ["merged", "merged/rwkv-1-adapter", "state", "state/rwkv-1.pth"])
def test_merge_adds_what_comes_first_to_its_base(first: str, work: Path, cli: Cli) -> None:
    done = cli("merge", first, "--output", "m.pth", "--overwrite", 1, "--compare", 0)
    assert done.code == 0, done.err
    merged, base = read_weights("m.pth"), read_weights("model.pth")
    if first.startswith("merged"):
        saved = read_weights("merged/rwkv-1.pth")
        assert all(torch.equal(x, saved[n]) for n, x in merged.items())
        swapped = cli("merge", first, "model.pth", "--output", "n.pth", "--compare", 0)
        assert swapped.code == 0, swapped.err
        os.unlink("n.pth")
    else:
        state = read_weights("state/rwkv-1.pth")
        assert merged.keys() == {*base, *state}
        assert all(torch.equal(merged[n], x) for n, x in state.items())


@pytest.mark.parametrize(
    ("first", "load_model", "load_adapter"),
    [
        ("merged", "model.pth", "merged/rwkv-1-adapter"),
        ("adapter/rwkv-0-adapter", "model.pth", "adapter/rwkv-0-adapter"),
        ("state", "model.pth", "state/rwkv-1.pth"),
        ("full", "full/rwkv-1.pth", ""),
    ],
)
def test_train_goes_on_from_what_comes_first(
    first: str, load_model: str, load_adapter: str, work: Path, cli: Cli, tmp_path: Path
) -> None:
    import yaml

    limits = ("--epoch_count", 1, "--epoch_steps", 1, "--accelerator", "cpu")
    done = cli("train", first, "data.jsonl", "--proj_dir", tmp_path / "o", *limits)
    assert done.code == 0, done.err
    saved = yaml.safe_load((tmp_path / "o" / "config.yaml").read_text())
    assert (saved["load_model"], saved["load_adapter"]) == (load_model, load_adapter)
    assert Path(saved["template"]).name == ("template.jinja" if first == "merged" else "chat")


def test_inspect_and_data_tell_of_a_run(work: Path, cli: Cli) -> None:
    facts = json.loads(cli("inspect", "adapter", "--json").out)
    assert (facts["kind"], facts["peft"], facts["load_model"]) == ("run", "lora", "model.pth")
    assert facts["newest"] == {"adapter/rwkv-1-adapter": "adapter"}
    assert cli("inspect", "state/rwkv-1.pth").out.count("state")
    found, named = cli("data", "merged", "--json"), cli(
        "data", "data.jsonl", "--json", "--template", "own.jinja", "--vocab_size", 320
    )  # fmt: skip
    assert json.loads(found.out)["rows"] == json.loads(named.out)["rows"]
    for first in ("model.pth", "merged/rwkv-1-adapter", "state/rwkv-1.pth"):
        done = cli("data", first)
        assert done.code == 2 and f"rwkv-peft inspect {first}" in done.err, done.err


def test_what_cannot_stand_first_is_named_with_the_right_command(
    work: Path, cli: Cli, tmp_path: Path, model_file: Path
) -> None:
    state, adapter, empty = tmp_path / "s.pth", tmp_path / "a", tmp_path / "empty"
    shutil.copy("state/rwkv-1.pth", state)
    shutil.copytree("merged/rwkv-1-adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere.pth"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    old, _ = old_run(tmp_path, model_file, "lora")
    empty.mkdir()
    shutil.copy("merged/config.yaml", empty)
    for line, wanted in (
        (["generate", state, "--prompt", "a"], f"rwkv-peft generate BASE --state {state}"),
        (["chat", adapter], f"rwkv-peft chat BASE --adapter {adapter}"),
        (["chat", old], f"rwkv-peft chat BASE --adapter {old}"),
        (["train", adapter, "data.jsonl"], f"train BASE data.jsonl --load_adapter {adapter}"),
        (["train", state, "data.jsonl"], f"train BASE data.jsonl --load_adapter {state}"),
        (["merge", state, "--output", "o.pth"], f"rwkv-peft merge BASE {state} --output"),
        (["convert", adapter], f"convert {adapter} --base_model BASE"),
        (["eval", state, "data.jsonl"], f"rwkv-peft eval BASE data.jsonl --state {state}"),
        (["train", "merged"], "rwkv-peft train --resume auto --proj_dir merged goes on with it"),
        (["generate", empty, "--prompt", "a"], "holds no result yet"),
        (["merge", "full", "--output", "o.pth"], "is a whole model already"),
        (["chat", "data.jsonl"], "a text file of JSON: give it as the data"),
        (["chat", "merged/rwkv-1-adapter", "--adapter", adapter], "leave out --adapter"),
        (["generate", "--prompt", "a"], "no model given"),
    ):
        done = cli(*line)
        assert done.code == 2 and wanted in done.err and done.err.count("\n") == 1, done.err


# the rest of a command's line behind its first argument
REST = {
    "train": "data.jsonl --epoch_count 1 --epoch_steps 1 --accelerator cpu --proj_dir",
    "chat": "--max_tokens 3",
    "generate": "--prompt a --max_tokens 3",
    "eval": "data.jsonl",
    "merge": "--compare 0 --output",
    "convert": "--output",
    "inspect": "",
    "data": "--show 0",
    "export": "--to pth --output",
}
# commands that cannot use a kind as it is, with what they say of it
REFUSED = {
    **{
        x: {
            "merge": f"{x} is a whole model: rwkv-peft merge {x} ADAPTER --output O",
            "convert": f"{x} is a whole model: rwkv-peft export",
            "data": f"{x} is a model and no data",
        }
        for x in ("model.pth", "model.st", "hf", "fla")
    },
    "s.state": {
        **dict.fromkeys(REST, "s.state is a state, which needs the model that it was trained on"),
        **{"inspect": "", "export": "", "data": "is a state and no data"},
    },
    "full": {
        "merge": "full has no adapter: full/rwkv-1.pth is a whole model already",
        "convert": "full/rwkv-1.pth is a whole model: rwkv-peft export",
    },
    "merged/rwkv-1-adapter": {"data": "is an adapter and no data"},
    "adapter/rwkv-1-adapter": {"data": "is an adapter and no data"},
    "state/rwkv-1.pth": {"data": "is a state and no data"},
    "adapter/rwkv-1-adapter/adapter_model.safetensors": {"data": "is an adapter and no data"},
    "adapter/rwkv-1-adapter/adapter_config.json": {"data": "is an adapter and no data"},
    "adapter/config.yaml": {
        **dict.fromkeys(REST, "adapter/config.yaml is a file of the run adapter, whose results"),
        "data": "adapter/config.yaml:1: not JSON",
    },
    "data.jsonl": {
        **dict.fromkeys(REST, "data.jsonl is a text file of JSON: give it as the data"),
        "data": "",
    },
    "missing.pth": dict.fromkeys(REST, "there is no file missing.pth"),
    "empty": {**dict.fromkeys(REST, "empty"), "inspect": "empty is a folder, of no run"},
}


@pytest.mark.parametrize("command", REST)
@pytest.mark.parametrize("first", [*(x for x in KINDS if x != "merged/rwkv-1.pth"), "empty"])
def test_every_command_uses_each_kind_or_says_what_to_do(
    command: str, first: str, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import io

    (work / "empty").mkdir(exist_ok=True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"3?\n")))
    rest = REST[command].split()
    is_folder = command == "train" or (command == "convert" and "state" not in first)
    if rest and rest[-1] in ("--proj_dir", "--output"):
        rest.append(str(tmp_path / ("out" if is_folder else "out.pth")))
    done = cli(command, first, *rest)
    if wanted := REFUSED.get(first, {}).get(command):
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert wanted in done.err
        assert re.match("错误：.*[一-鿿]{4}", cli(command, first, *rest, "--lang", "zh").err)
    else:
        assert done.code == 0, done.err


@pytest.mark.parametrize("base", ["hf", "fla", "model.st"])
@pytest.mark.parametrize("peft", ["lora", "state"])
def test_what_is_trained_on_a_base_in_another_layout_finds_it_again(
    base: str, peft: str, work: Path, cli: Cli, tmp_path: Path
) -> None:
    limits = ("--epoch_count", 1, "--epoch_steps", 1, "--accelerator", "cpu", "--merge", 0)
    out = tmp_path / "out"
    done = cli("train", base, "data.jsonl", "--peft", peft, "--proj_dir", out, *limits)
    assert done.code == 0, done.err
    for first in (out, out / ("rwkv-0.pth" if peft == "state" else "rwkv-0-adapter")):
        done = cli("generate", first, "--prompt", "a", "--max_tokens", 1)
        assert done.code == 0 and f"on its base {base}" in done.err, done.err


# what stands where data belongs -> what it is called
NO_DATA = {
    "model.pth": "a model",
    "hf": "a model",
    "model.st": "a model",
    "merged": "the folder of a run",
    "merged/rwkv-1-adapter": "an adapter",
    "state/rwkv-1.pth": "a state",
}


@pytest.mark.parametrize("path", NO_DATA)
@pytest.mark.parametrize(
    "line",
    ["train model.pth {}", "train model.pth data.jsonl --val_file {}", "eval model.pth {}"],
)
def test_what_is_no_data_is_named_where_data_belongs(
    path: str, line: str, work: Path, cli: Cli
) -> None:
    words = line.format(path).split()
    done = cli(*words)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    wanted = f"{path} is {NO_DATA[path]} and no data: rwkv-peft inspect {path} says what it holds"
    assert wanted in done.err and f"rwkv-peft {words[0]} model.pth data.jsonl" in done.err
    assert re.match("错误：.*[一-鿿]{4}", cli(*words, "--lang", "zh").err)


def test_a_list_of_data_may_be_longer_than_a_name_and_a_folder_have_any_manifest(
    work: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    shutil.copy("data.jsonl", tmp_path / "rows")
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    rows = json.loads(cli("data", "data.jsonl", "--json").out)["num_rows"]
    assert find_kind(tmp_path / "rows") == "other"
    for data, count in ((",".join(["data.jsonl"] * 40), 40),):
        assert json.loads(cli("data", data, "--json").out)["num_rows"] == count * rows
        done = cli("train", "model.pth", data, "--proj_dir", tmp_path / "o", "--dry_run")
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("generate model.pth --adapter adapter", "adapter/rwkv-1-adapter"),
        ("generate model.pth --adapter merged", "merged/rwkv-1-adapter"),
        ("generate model.pth --state state", "state/rwkv-1.pth"),
        ("generate model.pth --adapter adapter/rwkv-0-adapter/adapter_model.safetensors", ""),
        ("chat model.pth --adapter adapter", "adapter/rwkv-1-adapter"),
        ("eval model.pth data.jsonl --state state", "state/rwkv-1.pth"),
        ("merge model.pth adapter --output {o}.pth", "adapter/rwkv-1-adapter"),
        ("merge model.pth --adapter state --output {o}.pth", "state/rwkv-1.pth"),
        ("merge adapter/rwkv-0-adapter/adapter_config.json --output {o}.pth", "model.pth"),
        ("train model.pth data.jsonl --load_adapter adapter --proj_dir {o}", "/rwkv-1-adapter"),
        ("train model.pth data.jsonl --load_adapter state --proj_dir {o}", "state/rwkv-1.pth"),
    ],
)
def test_a_flag_of_adapters_or_states_takes_the_folder_of_a_run(
    line: str, wanted: str, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"3?\n")))
    words = line.format(o=tmp_path / "o").split()
    more = {"train": REST["train"].split()[1:-1], "merge": ["--compare", "0"], "eval": []}
    more |= {"generate": ["--max_tokens", "1"], "chat": ["--max_tokens", "1"]}
    words += [*more[words[0]], *["--prompt", "a"] * (words[0] == "generate")]
    done = cli(*words)
    assert done.code == 0, done.err
    assert wanted in next((x for x in done.err.splitlines() if x.startswith("note: ")), "")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "generate model.pth --adapter state/rwkv-1.pth",
            "--adapter state/rwkv-1.pth is a learned state: rwkv-peft generate model.pth --state s",
        ),
        ("chat model.pth --adapter state", "rwkv-peft chat model.pth --state state/rwkv-1.pth"),
        (
            "generate model.pth --state adapter/rwkv-0-adapter",
            "is an adapter: rwkv-peft generate model.pth --adapter adapter/rwkv-0-adapter",
        ),
        ("generate model.pth --adapter full", "full/rwkv-1.pth is a whole model: it is given"),
        ("generate model.pth --state model.pth", "model.pth is a whole model: it is given alone"),
        ("train model.pth data.jsonl --load_adapter full", "is a whole model: it is given alone"),
        ("merge model.pth model.pth --output x.pth", "is a whole model: it is given alone"),
        ("train data.jsonl", "no model given: rwkv-peft train model.pth data.jsonl"),
        ("eval data.jsonl", "no model given: rwkv-peft eval model.pth data.jsonl"),
        ("train --proj_dir full --resume auto", "full has no checkpoint to go on from: give the w"),
    ],
)
def test_a_wrong_kind_behind_a_flag_is_named_with_the_right_line(
    line: str, wanted: str, work: Path, cli: Cli
) -> None:
    words = line.split()
    done = cli(*words, *["--prompt", "a"] * (words[0] == "generate"))
    assert done.code == 2 and wanted in done.err and done.err.count("\n") == 1, done.err
    said = cli(*words, *["--prompt", "a"] * (words[0] == "generate"), "--lang", "zh").err
    assert re.match("错误：.*[一-鿿]{4}", said), said


def test_a_run_that_goes_on_is_told_from_one_that_ended(
    work: Path, cli: Cli, tmp_path: Path
) -> None:
    from rwkv_peft.training.folder import take_folder

    folder = tmp_path / "new"
    with take_folder(str(folder)):
        # before the first step there is nothing, and after it the settings alone
        for _ in range(2):
            for line in (
                ["chat", folder],
                ["generate", folder, "--prompt", "a"],
                ["merge", folder, "--output", "x.pth"],
                ["train", folder, "data.jsonl"],
                ["export", folder, "--to", "gguf"],
            ):
                done = cli(*line)
                assert done.code == 2 and done.err.count("\n") == 1, done.err
                assert f"of a run that goes on (process {os.getpid()} on " in done.err
            done = cli("train", "--proj_dir", folder, "--resume", "auto")
            assert f"is in use by process {os.getpid()}" in done.err
            assert cli("inspect", folder).code == 0
            shutil.copy("adapter/config.yaml", folder)
        shutil.copytree("adapter/rwkv-1-adapter", folder / "rwkv-0-adapter")
        assert cli("generate", folder, "--prompt", "a", "--max_tokens", 1).code == 0
    shutil.rmtree(folder / "rwkv-0-adapter")
    assert "holds no result yet" in cli("chat", folder).err


def test_the_newest_result_is_that_of_the_last_epoch_or_of_a_later_stop(
    work: Path, cli: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree("adapter", run)
    for epoch in range(2, 12):
        shutil.copytree(run / "rwkv-1-adapter", run / f"rwkv-{epoch}-adapter")
    line = ("generate", run, "--prompt", "a", "--max_tokens", 1)
    assert "rwkv-11-adapter" in cli(*line).err
    stopped = run / "checkpoints" / "step-000100"
    shutil.copytree(run / "rwkv-1-adapter", stopped / "rwkv-adapter")
    for name in ("manifest.json", "run.json"):
        (stopped / name).write_text("{}")
    os.utime(stopped / "rwkv-adapter", (4e9, 4e9))
    assert "step-000100/rwkv-adapter" in cli(*line).err
    assert "step-000100/rwkv-adapter" in cli("generate", stopped, *line[2:]).err
