"""A dry run says what a run would, and leaves nothing."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

Cli = Callable[..., SimpleNamespace]


@pytest.mark.parametrize("method", ["lora", "state", "none"])
def test_a_dry_run_says_all_and_writes_nothing(
    method: str, cli: Cli, model_file: Path, data_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    line = ["train", model_file, data_file, "--peft", method, "--accelerator", "cpu"]
    line += ["--micro_bsz", 1, "--ctx_len", 32, "--random_seed", 1, "--epoch_count", 9]
    done = cli(*line, "--dry_run")
    assert done.code == 0, done.err
    assert sorted(os.listdir(tmp_path)) == before
    for part in ("chosen: ", "model: ", "data: ", "plan: 9 epochs", "GiB of cpu were free before"):
        assert part in done.err, part
    steps = int(re.search(r"([\d,]+) optimizer steps", done.err)[1].replace(",", ""))  # type: ignore[index]
    assert re.search(rf"time: about .+ for {steps} steps of [\d.e-]+ s, by 3 trial steps", done.err)
    assert "nothing was written" in done.err and "step 1/" not in done.err
    # the first rows, what is trained between marks: all but the first token
    shown = done.out.split("\n--- ")
    assert len(shown) == 4 and all("«" in part for part in shown[1:])
    said = [x for x in done.err.splitlines() if x.startswith("chosen: ")]
    # a run chooses the same
    run = cli(*line, "--epoch_count", 1, "--epoch_steps", 1, "--proj_dir", "run")
    assert run.code == 0, run.err
    others = {"proj_dir", "epoch_count", "lr_final", "warmup_steps", "data"}
    assert {x for x in said if x.split()[1] not in others} <= set(run.err.splitlines())


def test_a_dry_run_refuses_what_a_run_refuses(
    cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    line = ["train", model_file, data_file, "--proj_dir", tmp_path / "out", "--accelerator", "cpu"]
    assert cli(*line, "--epoch_count", 1, "--epoch_steps", 1).code == 0
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    done = cli(*line, "--dry_run")
    assert done.code == 2 and "holds a run" in done.err
    again = cli(*line, "--dry_run", "--overwrite", 1)
    assert again.code == 0, again.err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == files
