"""Checkpoints that are damaged or of another run are refused or passed over, each with a word."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.checkpoint import tree
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.checkpoint.tree import MANIFEST, TENSORS, VALUES
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.models.initial import initial_weights
from rwkv_peft.training import resume
from rwkv_peft.training.run import train
from tests.conftest import make_model_config
from tests.training.test_resume import losses, results

Cli = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a finished run of eight steps, with a checkpoint of every other."""
    folder = tmp_path_factory.mktemp("made")
    sizes = {"n_layer": 1, "n_embd": 64, "dim_att": 64, "dim_ffn": 128}
    write_weights(folder / "base.pth", initial_weights(make_model_config(**sizes), 0))
    rows = [{"text": f"row {i}: " + "words and " * (1 + i % 3)} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        load_model=str(folder / "base.pth"),
        data_file=str(folder / "data.jsonl"),
        proj_dir=str(folder / "run"),
        peft="lora",
        peft_config={"r": 4},
        dataload="pad",
        ctx_len=40,
        micro_bsz=2,
        epoch_count=2,
        lr_init=1e-2,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
        merge=0,
        save_every_steps=2,
        keep=0,
    )
    assert train(config).steps == 8
    return config


@pytest.fixture
def config(made: TrainConfig, tmp_path: Path) -> TrainConfig:
    """That of a copy of all this, its run as it was after step 6."""
    folder = tmp_path / "copy"
    shutil.copytree(Path(made.proj_dir).parent, folder)
    run = folder / "run"
    shutil.rmtree(run / "checkpoints" / "step-000008")
    shutil.rmtree(run / "rwkv-1-adapter")
    names = ("load_model", "data_file", "proj_dir")
    paths = {name: str(folder / Path(getattr(made, name)).name) for name in names}
    return replace(made, **paths)


def checkpoint(config: TrainConfig, step: int = 6) -> Path:
    return Path(config.proj_dir, "checkpoints", f"step-{step:06d}")


def assert_same(run: Path, whole: Path) -> None:
    """As the one that was never stopped, but for the names in the log of other folders."""
    assert losses(run) == losses(whole) and results(run) == results(whole)
    logs = [(x / "train_log.txt").read_text().split("\n") for x in (run, whole)]
    assert [x.partition(",")[0] for x in logs[0][2:]] == [x.partition(",")[0] for x in logs[1][2:]]
    assert not [x for x in run.rglob(".*")]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def flags(config: TrainConfig) -> list[str]:
    """A line that says what has moved with the copy."""
    names = ("load_model", "data_file", "proj_dir")
    return [word for n in names for word in (f"--{n}", getattr(config, n))]


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda x: flip(x / TENSORS), "its hash differs"),
    "a flipped bit in the values": (lambda x: flip(x / VALUES), "its hash differs"),
    "a flipped bit in the header": (lambda x: flip(x / TENSORS, 0.0), "its hash differs"),
    "a cut file": (lambda x: os.truncate(x / TENSORS, 1000), "has 1,000 bytes"),
    "a missing file": (lambda x: (x / TENSORS).unlink(), "cannot be read"),
    "no manifest": (lambda x: (x / MANIFEST).unlink(), "not written to its end"),
    "an empty manifest": (lambda x: (x / MANIFEST).write_text(""), "manifest.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_its_path(
    name: str, config: TrainConfig, cli: Cli
) -> None:
    damage, reason = DAMAGES[name]
    damage(checkpoint(config))
    before = content_of(Path(config.proj_dir))
    done = cli("train", *flags(config), "--resume", checkpoint(config))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "step-000006 is no whole checkpoint" in done.err and reason in done.err
    assert content_of(Path(config.proj_dir)) == before


def test_auto_passes_damaged_ones_over_with_a_word_and_ends_the_same(
    config: TrainConfig, made: TrainConfig, cli: Cli
) -> None:
    flip(checkpoint(config) / TENSORS)
    (checkpoint(config, 4) / MANIFEST).unlink()
    done = cli("train", *flags(config), "--resume", "auto")
    assert done.code == 0, done.err
    for step, reason in ((6, "hash differs"), (4, "not written to its end")):
        assert any(
            f"step-{step:06d} is passed over" in x and reason in x for x in done.err.split("\n")
        )
    assert "goes on after step 2 of 8" in done.err
    assert_same(Path(config.proj_dir), Path(made.proj_dir))


def test_with_no_whole_checkpoint_auto_begins_again_and_ends_the_same(
    config: TrainConfig, made: TrainConfig
) -> None:
    for step in (2, 4, 6):
        flip(checkpoint(config, step) / VALUES)
    # what the program drew for itself is drawn again
    train(replace(config, resume="auto", random_seed=-1))
    assert losses(Path(config.proj_dir)) == losses(Path(made.proj_dir))
    assert results(Path(config.proj_dir)) == results(Path(made.proj_dir))


def test_a_checkpoint_of_a_newer_program_is_refused_and_not_passed_over(
    config: TrainConfig, cli: Cli
) -> None:
    path = checkpoint(config) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    for which in ("auto", checkpoint(config)):
        done = cli("train", *flags(config), "--resume", which)
        assert done.code == 2 and "format 9, of rwkv-peft" in done.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--lr_init", "0.02"], "lr_init is 0.02 and was 0.01"),
        (["--epoch_count", "5"], "epoch_count is 5 and was 2"),
        (["--peft_config", '{"r": 8}'], "peft_config is {'r': 8} and was {'r': 4}"),
        (["--peft", "miss"], "peft is miss and was lora"),
        (["--weight_decay", "0.1", "--random_seed", "2"], "random_seed is 2 and was 1"),
        (["--epoch_count", "5", "--resume_changes", "lr_init"], "epoch_count is 5 and was 2"),
        (["--resume_changes", "epochs"], "no setting epochs"),
        (["--resume_changes", "peft_config", "--peft_config", '{"r": 8}'], "(8, 64) and was (4"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    changes: list[str], words: str, config: TrainConfig, cli: Cli
) -> None:
    before = content_of(Path(config.proj_dir))
    done = cli("train", *flags(config), "--resume", "auto", *changes)
    assert done.code == 2 and words in done.err and "\n" not in done.err.strip(), done.err
    assert content_of(Path(config.proj_dir)) == before


def test_a_setting_named_may_change_and_one_that_changes_no_bit_needs_no_name(
    config: TrainConfig, cli: Cli
) -> None:
    line = ["--resume", "auto", "--epoch_count", 3, "--keep", 1, "--num_workers", 1]
    done = cli("train", *flags(config), *line, "--resume_changes", "epoch_count,save_every_steps")
    assert done.code == 0, done.err
    assert "epoch_count is 3 and was 2" in done.err
    assert len(losses(Path(config.proj_dir))) == 12
    assert [x.name for x in checkpoint(config).parent.iterdir()] == ["step-000012"]


@pytest.mark.parametrize(
    ("changes", "words", "steps"),
    [
        ("--optimizer muon", "muon begins without the moments of adamw", 8),
        ("--optimizer adafactor", "adafactor begins without the moments of adamw", 8),
        ("--precision fp16", "precision is fp16 and was fp32", 8),
        # half of the last four micro-batches of two rows are left
        ("--accumulate_grad_batches 2", "goes on after step 6 of 7", 7),
        ("--micro_bsz 4", "has 2 micro-batches and had 4: it goes on where 50.0% of the pass", 7),
        ("--micro_bsz 1", "has 8 micro-batches and had 4: it goes on where 50.0% of the pass", 10),
        ("--val_split 0.3", "evaluations begin anew", 0),
    ],
)
def test_what_is_allowed_by_name_goes_on_and_learns_all_that_is_left(
    changes: str, words: str, steps: int, config: TrainConfig, cli: Cli
) -> None:
    line = [*flags(config), "--resume", "auto", *changes.split()]
    done = cli("train", *line, "--resume_changes", changes[2:].partition(" ")[0])
    assert done.code == 0 and words in done.err, done.err
    assert not steps or len(losses(Path(config.proj_dir))) == steps
    assert Path(config.proj_dir, "rwkv-1-adapter", "adapter_model.safetensors").exists()


def test_rows_that_are_left_are_the_same_in_micro_batches_of_another_size(
    config: TrainConfig, cli: Cli
) -> None:
    line = [*flags(config), "--resume", checkpoint(config), "--resume_changes"]
    found = []
    for name, value in (("micro_bsz", 4), ("accumulate_grad_batches", 2)):
        assert cli("train", *line, name, f"--{name}", value).code == 0
        found.append(losses(Path(config.proj_dir))[-1])
    assert found[0].pop("loss") == pytest.approx(found[1].pop("loss"), rel=1e-6)
    assert found[0]["tokens"] == found[1]["tokens"] and found[0]["lr"] == found[1]["lr"]


def test_prompts_may_be_asked_from_a_checkpoint_on(
    config: TrainConfig, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("row 3:\n")
    line = [*flags(config), "--resume", "auto", "--val_prompts", tmp_path / "prompts.txt"]
    done = cli("train", *line, "--val_every_steps", 1, "--resume_changes", "val_every_steps")
    assert done.code == 0, done.err
    samples = Path(config.proj_dir, "val_samples.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in samples] == [6, 7, 8]


def test_other_data_to_evaluate_on_is_refused_unless_allowed(
    config: TrainConfig, cli: Cli, tmp_path: Path
) -> None:
    held_out = tmp_path / "held.jsonl"
    shutil.copy(config.data_file, held_out)
    run = tmp_path / "evaluated"
    config = replace(config, proj_dir=str(run), val_file=str(held_out), val_every_steps=1)
    assert train(config).best is not None
    held_out.write_text(json.dumps({"text": "words and words"}) + "\n")
    line = ["train", *flags(config), "--resume", checkpoint(config)]
    done = cli(*line)
    assert done.code == 2 and "the data of evaluations is other than the run's" in done.err
    assert "--resume_changes val_file" in done.err
    done = cli(*line, "--resume_changes", "val_file")
    assert done.code == 0 and "evaluations begin anew, as their data is another" in done.err
    # the loss on other documents is compared with none on those before
    evaluations = [json.loads(x) for x in (run / "val_data.jsonl").read_text().splitlines()]
    assert evaluations[-3]["step"] == 6 and evaluations[-3]["is_best"]


def test_a_finished_run_says_so_and_touches_nothing(made: TrainConfig, cli: Cli) -> None:
    before = content_of(Path(made.proj_dir))
    done = cli("train", "--resume", checkpoint(made, 8))
    assert done.code == 0 and "the run is complete: all of its 8 steps" in done.err
    result = train(replace(made, resume="auto"))
    assert (result.steps, result.adapter) == (8, Path(made.proj_dir, "rwkv-1-adapter"))
    assert content_of(Path(made.proj_dir)) == before


def test_another_base_is_refused_and_the_same_by_another_name_is_not(
    config: TrainConfig, made: TrainConfig, cli: Cli
) -> None:
    moved = Path(config.load_model).with_name("moved.pth")
    shutil.copy(config.load_model, moved)
    weights = {n: x * 1.01 for n, x in read_weights(config.load_model).items()}
    write_weights(config.load_model, weights)
    done = cli("train", *flags(config), "--resume", "auto")
    assert done.code == 2 and "another base than the run's" in done.err
    line = flags(replace(config, load_model=str(moved)))
    assert cli("train", *line, "--resume", "auto").code == 0
    assert_same(Path(config.proj_dir), Path(made.proj_dir))


def test_other_data_is_refused_unless_allowed(config: TrainConfig, cli: Cli) -> None:
    done = cli("train", *flags(config), "--resume", "auto", "--append_eod", 0)
    assert (
        done.code == 2 and "the data is other than the run's: append_eod is 0 and was 1" in done.err
    )
    path = Path(config.data_file)
    path.write_text(path.read_text().replace("row 3", "row x"))
    done = cli("train", *flags(config), "--resume", "auto")
    assert done.code == 2 and "the data is other than the run's: data_file" in done.err
    line = ["--resume", "auto", "--resume_changes", "data_file"]
    assert cli("train", *flags(config), *line).code == 0


def test_another_version_of_a_library_is_told(
    config: TrainConfig, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = resume.find_versions
    monkeypatch.setattr(resume, "find_versions", lambda x: {**find(x), "torch": "9.9"})
    done = cli("train", *flags(config), "--resume", "auto")
    assert done.code == 0 and "torch is 9.9 and was" in done.err
    assert "not with the bits" in done.err


def test_what_resume_cannot_mean_is_said(config: TrainConfig, cli: Cli, tmp_path: Path) -> None:
    for line, words in (
        (["--resume", "auto"], "needs --proj_dir"),
        (["--resume", tmp_path / "no"], "does not exist"),
        (["--resume", config.data_file], "is no folder"),
        (["--resume", config.proj_dir], f"give {checkpoint(config)}"),
        (["--resume_changes", "lr_init"], "needs --resume"),
    ):
        done = cli("train", config.load_model, config.data_file, *line)
        assert done.code == 2 and words in done.err, done.err
    done = cli("train", *flags(config))
    assert done.code == 2 and "--resume auto to go on with it" in done.err


def test_a_copied_checkpoint_goes_on_in_a_folder_of_its_own(
    config: TrainConfig, made: TrainConfig, cli: Cli, tmp_path: Path
) -> None:
    source, other = checkpoint(config), str(tmp_path / "other")
    line = [*flags(replace(config, proj_dir=other)), "--resume", source]
    assert cli("train", *line).code == 0
    assert losses(Path(other)) == losses(Path(made.proj_dir))
    adapter = "rwkv-1-adapter/adapter_model.safetensors"
    assert Path(other, adapter).read_bytes() == Path(made.proj_dir, adapter).read_bytes()


@pytest.mark.parametrize(
    ("within", "resume", "proj_dir"),
    [
        ("run/checkpoints/step-000006", ".", []),
        ("run/checkpoints/step-000006", "../step-000006", []),
        ("run/checkpoints", "step-000006", []),
        ("run", "{run}/checkpoints/step-000006", ["--proj_dir", "."]),
        (".", "./run/checkpoints/step-000006", ["--proj_dir", "{run}"]),
    ],
)
def test_the_folder_of_a_run_is_found_however_it_is_spelled(
    within: str,
    resume: str,
    proj_dir: list[str],
    config: TrainConfig,
    made: TrainConfig,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(config.proj_dir)
    monkeypatch.chdir(run.parent / within)
    line = ["--resume", resume, *proj_dir]
    files = ["--load_model", config.load_model, "--data_file", config.data_file]
    done = cli("train", *files, *(x.format(run=run) for x in line))
    assert done.code == 0, done.err
    assert losses(run) == losses(Path(made.proj_dir))
    assert results(run) == results(Path(made.proj_dir))


def test_a_full_disk_skips_a_checkpoint_or_stops_the_run_and_the_last_one_stays(
    config: TrainConfig, made: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, count = tree._Hashing.write, 0

    def fill_up(self: Any, data: Any) -> None:
        nonlocal count
        count += 1
        # in the middle of the third checkpoint
        if count > 2.5 * per_checkpoint:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    header = json.loads(_header(checkpoint(config) / TENSORS))
    per_checkpoint = len(header) + 1
    monkeypatch.setattr(tree._Hashing, "write", fill_up)
    config = replace(config, proj_dir=str(tmp_path / "full"), keep=1)
    result = train(config)
    assert result.steps == 8 and result.checkpoint == checkpoint(config, 4)
    assert "No space left on device" in (tmp_path / "full" / "train_log.txt").read_text()
    assert results(tmp_path / "full") == results(Path(made.proj_dir))
    assert [x.name for x in checkpoint(config).parent.iterdir()] == ["step-000004"]
    count = 0
    config = replace(config, proj_dir=str(tmp_path / "stops"), on_save_error="stop")
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(config)
    assert [x.name for x in checkpoint(config).parent.iterdir()] == ["step-000004"]
    monkeypatch.undo()
    assert train(replace(config, resume="auto")).steps == 8
    assert_same(tmp_path / "stops", Path(made.proj_dir))


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]
