"""A run has a folder of its own, from its first moment, and leaves what is not its own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError, DataError, TrainingError
from rwkv_peft.training import describe
from rwkv_peft.training.folder import take_folder
from rwkv_peft.training.run import train
from rwkv_peft.training.step import full_step

Cli = Callable[..., Any]
# takes the folder named by its argument, tells it, and holds it until its input ends
HOLD = (
    "import sys\n"
    "from rwkv_peft.errors import ConfigError\n"
    "from rwkv_peft.training.folder import take_folder\n"
    "print('ready', flush=True)\n"
    "sys.stdin.readline()\n"
    "try:\n"
    "    with take_folder(sys.argv[1]) as claim:\n"
    "        (claim.path / 'mine').write_text(sys.argv[2])\n"
    "        print(claim.path, flush=True)\n"
    "        sys.stdin.readline()\n"
    "except ConfigError as error:\n"
    "    print(error, flush=True)\n"
    "    sys.stdin.readline()\n"
)


@pytest.fixture
def config(model_file: Path, data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        peft="lora",
        peft_config={"r": 2},
        epoch_steps=1,
        epoch_count=2,
        micro_bsz=2,
        ctx_len=16,
        precision="fp32",
        accelerator="cpu",
        random_seed=0,
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("training began")


def test_a_folder_with_a_run_is_refused_and_left_as_it_was(config: TrainConfig) -> None:
    first = train(config)
    before = tree(first.proj_dir)
    with pytest.raises(ConfigError, match=r"out holds a run \(rwkv-0-adapter, rwkv-0.pth, .*\)"):
        train(replace(config, epoch_count=1), step=never)
    # numbers that no file has yet mix two runs all the same
    with pytest.raises(ConfigError, match="another --proj_dir, or --overwrite 1"):
        train(replace(config, epoch_begin=7), step=never)
    assert tree(first.proj_dir) == before


def test_overwrite_removes_the_files_of_the_run_and_no_others(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = train(config).proj_dir
    stopped = out / "checkpoints" / "step-000007"
    stopped.mkdir(parents=True)
    (out / "rwkv-0-adapter").rename(stopped / "rwkv-adapter")
    mine = ["notes.txt", "rwkv-1.pth.bak", "rwkv-7-world.pth", "rwkv-1-adapter/README.md"]
    mine += ["checkpoints/mine.pth", "more/rwkv-1.pth", "model.safetensors"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"of the user")
    train(replace(config, epoch_count=1, overwrite=1))
    assert {n for n, content in tree(out).items() if content == b"of the user"} == set(mine)
    assert set(tree(out)) - set(mine) == {
        *("config.yaml", "loss_data.jsonl", "merge_report.json", "train_log.txt", "rwkv-0.pth"),
        *(f"rwkv-0-adapter/{n}" for n in ("adapter_config.json", "rwkv_peft.json")),
        "rwkv-0-adapter/adapter_model.safetensors",
    }
    assert (out / "train_log.txt").read_text().count("run begins") == 1
    # who repeats the run from its settings has not asked to lose it
    assert "overwrite: 0\n" in (out / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"rwkv-1-adapter/README\.md would be replaced by"):
        train(replace(config, overwrite=1), step=never)
    (out / "rwkv-5.pth").write_bytes(b"of the user")
    with pytest.raises(ConfigError, match=r"holds rwkv-5.pth, and no config.yaml of the run"):
        train(replace(config, overwrite=1), step=never)


def test_an_input_is_never_cleared(
    config: TrainConfig, tmp_path: Path, make_data_file: Callable[..., Path]
) -> None:
    first = train(config)
    assert first.weights and first.adapter
    before = tree(first.proj_dir)
    link = tmp_path / "link"
    link.symlink_to(first.proj_dir)
    readings = [
        {"load_model": str(first.weights)},
        {"load_model": str(link / "rwkv-0.pth")},
        {"load_adapter": str(first.adapter), "peft": "auto", "peft_config": {}},
        {"data_file": str(first.proj_dir / "loss_data.jsonl")},
    ]
    for reading in readings:
        with pytest.raises(ConfigError, match=r"which this run reads and --overwrite 1 would"):
            train(replace(config, overwrite=1, **reading), step=never)
    assert tree(first.proj_dir) == before
    # its settings and template may be read again
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    own = replace(config, overwrite=1, template=str(template))
    kept = train(own).proj_dir / "template.jinja"
    train(replace(own, template=str(kept)))
    assert kept.read_text() == template.read_text()


def test_what_no_run_wrote_is_not_replaced(config: TrainConfig, tmp_path: Path) -> None:
    for name in ("config.yaml", "rwkv-1.pth", "rwkv-0-adapter", "template.jinja"):
        out = tmp_path / f"with {name}"
        path = out / name / "adapter_config.json" if name.endswith("adapter") else out / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"epoch_count: 1\n")
        for overwrite in (0, 1):
            again: Any = replace(config, proj_dir=str(out), overwrite=overwrite)
            with pytest.raises(ConfigError, match=f"holds {name}, and no config.yaml of the run"):
                train(again, step=never)
        assert list(tree(out).values()) == [b"epoch_count: 1\n"]


def test_a_run_that_cannot_begin_leaves_no_trace(
    config: TrainConfig, tmp_path: Path, make_data_file: Callable[..., Path]
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    empty = make_data_file([""], "empty.jsonl")
    deep = replace(config, proj_dir=str(tmp_path / "a" / "b"))
    for _ in range(2):
        with pytest.raises(DataError):
            train(replace(deep, data_file=str(empty)))
        with pytest.raises(TrainingError, match="out of memory"):
            train(deep, step=failing)
        assert not (tmp_path / "a").exists()
    # the run that was to be overwritten is still there
    before = tree(train(config).proj_dir)
    with pytest.raises(TrainingError, match="out of memory"):
        train(replace(config, overwrite=1), step=failing)
    assert tree(tmp_path / "out") == before


def test_a_run_that_left_only_logs_can_be_run_again(config: TrainConfig, tmp_path: Path) -> None:
    calls = 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise torch.OutOfMemoryError("no room")
        return full_step(*args, **options)

    with pytest.raises(TrainingError, match="out of memory at step 2"):
        train(replace(config, epoch_steps=3), step=failing)
    out = tmp_path / "out"
    first = (out / "loss_data.jsonl").read_bytes()
    assert set(tree(out)) == {"config.yaml", "loss_data.jsonl", "train_log.txt"}
    train(config)
    assert (out / "loss_data-1.jsonl").read_bytes() == first
    assert (out / "train_log.txt").read_text().count("run begins") == 2


def hold(cwd: Path, name: str, word: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, name, word],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def tell(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def take_at_once(cwd: Path, names: list[str]) -> list[str]:
    """What processes that take their folders at the same moment say."""
    processes = [hold(cwd, name, str(i)) for i, name in enumerate(names)]
    assert {p.stdout.readline() for p in processes} == {"ready\n"}
    for process in processes:
        tell(process)
    said = [p.stdout.readline().strip() for p in processes]
    for i, line in enumerate(said):
        if "is in use" not in line:
            assert (cwd / line / "mine").read_text() == str(i)
            assert line in names or not names[i]
    for process in processes:
        process.communicate("\n", timeout=60)
    return said


def test_processes_at_once_take_different_folders(tmp_path: Path) -> None:
    said = take_at_once(tmp_path, ["", "", "", ""])
    assert sorted(said) == ["out", "out-2", "out-3", "out-4"]
    said = take_at_once(tmp_path, ["a/b", "a/b", "a/b"])
    refused = [line for line in said if line != "a/b"]
    assert len(refused) == 2
    assert all(
        line.startswith("--proj_dir a/b is in use by process ") and line.count(" on ") == 1
        for line in refused
    )
    assert not list(tmp_path.rglob(".run*"))


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    process = hold(tmp_path, "out", "")
    tell(process)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "out\n"]
    with (
        pytest.raises(ConfigError, match=f"in use by process {process.pid} on "),
        take_folder(str(tmp_path / "out")),
    ):
        pass
    process.kill()
    process.communicate(timeout=60)
    assert (tmp_path / "out" / ".run.lock").exists()
    with take_folder(str(tmp_path / "out")):
        pass
    assert set(tree(tmp_path / "out")) == {"mine"}


@pytest.mark.slow
def test_fifty_pairs_of_runs_lose_and_mix_nothing(config: TrainConfig, tmp_path: Path) -> None:
    common = [sys.executable, "-m", "rwkv_peft.cli.main", "train", config.load_model]
    common += [config.data_file, "--epoch_count", "1", "--micro_bsz", "4", "--accelerator", "cpu"]
    for number in range(50):
        folder = tmp_path / f"pair{number}"
        folder.mkdir()
        named = ["--proj_dir", "run"] if number % 2 else []
        runs = [
            subprocess.Popen(
                [*common, *named, "--peft_config", json.dumps({"r": r})],
                cwd=folder,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in (1, 2)
        ]
        errors = [run.communicate(timeout=300)[1] for run in runs]
        codes = [run.returncode for run in runs]
        ranks = []
        for out in folder.iterdir():
            saved = json.loads((out / "rwkv-0-adapter" / "adapter_config.json").read_text())
            ranks.append(saved["r"])
            assert f"r: {saved['r']}\n" in (out / "config.yaml").read_text()
            assert len((out / "loss_data.jsonl").read_text().splitlines()) == 1
        if named:
            assert sorted(codes) == [0, 2]
            assert errors[codes.index(2)].count("\n") == 1 and "--proj_dir" in errors[0] + errors[1]
            assert ranks == [codes.index(0) + 1]
        else:
            assert codes == [0, 0] and sorted(ranks) == [1, 2]


def write_states(path: Path, names: list[str]) -> Path:
    rows = [{"text": f"some words for {i}", "state": name} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "names a folder"),
        ("../../up", "names a folder"),
        ("/abs", "names a folder"),
        ("x" * 300, "File name too long"),
        # fits itself, but not with what is added while it is written
        ("字" * 76, "File name too long"),
    ],
)
def test_names_of_states_that_cannot_be_files_end_before_the_first_step(
    name: str, reason: str, config: TrainConfig, tmp_path: Path
) -> None:
    data = write_states(tmp_path / "states.jsonl", ["good", name])
    own = replace(config, data_file=str(data), peft="state", peft_config={})
    with pytest.raises(ConfigError, match=f"could not be saved: .*{reason}") as caught:
        train(own, step=never)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()


def test_names_that_are_one_on_this_disk_are_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_states(tmp_path / "states.jsonl", ["Poet", "poet", "..", "a b"])
    own = replace(config, data_file=str(data), peft="state", peft_config={})
    exists = Path.exists

    def exists_in_any_case(path: Path) -> bool:
        return exists(path) or any(
            p.name.lower() == path.name.lower() for p in path.parent.glob("*")
        )

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", exists_in_any_case)
        with pytest.raises(ConfigError, match="another has the same name here"):
            train(own, step=never)
    out = train(own).proj_dir
    assert {p.name for p in out.glob("rwkv-1*")} == {
        f"rwkv-1-{name}.pth" for name in ("Poet", "poet", "..", "a b")
    }
    # states are known as such by what they hold
    (out / "rwkv-1-world.pth").write_bytes(b"of the user")
    train(replace(own, overwrite=1, epoch_count=1))
    assert {p.name for p in out.glob("rwkv-1*")} == {"rwkv-1-world.pth"}


def test_too_little_room_is_told_with_both_numbers(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = describe.shutil.disk_usage(config.load_model)
    monkeypatch.setattr(describe.shutil, "disk_usage", lambda _: usage._replace(free=2**20 + 2**19))
    train(config)
    said = re.search(
        r"warning: 2 saves will take about ([\d.]+) MiB, and .* has ([\d.]+) MiB free",
        capsys.readouterr().err,
    )
    assert said and said[2] == "1.5"
    # each save has as many bytes as the model, and an adapter beside it
    size = Path(config.load_model).stat().st_size
    assert 2 * size < float(said[1]) * 2**20 < 2.5 * size
    train(replace(config, overwrite=1, merge=0))
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/proc/x", "/dev/null", "/dev/null/x"])
@pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's")
def test_a_folder_that_cannot_be_written_is_one_line(
    name: str, config: TrainConfig, cli: Cli
) -> None:
    done = cli("train", config.load_model, config.data_file, "--proj_dir", name)
    assert done.code == 2
    assert done.err.startswith("error: cannot write in --proj_dir /") and done.err.count("\n") == 1
    assert "give another --proj_dir" in done.err
