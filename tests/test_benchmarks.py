"""The benchmarks run on any machine, and measure nothing that is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.methods import Method
from rwkv_peft.methods.catalog import method_config
from rwkv_peft.models.base import RWKV
from rwkv_peft.ops.dispatch import Backend
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = BENCHMARKS / "ops.py"
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmark_of_operators", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SECONDS", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


@pytest.mark.parametrize("rows", [[], ["--packed"]])
def test_every_operator_is_measured_on_this_machine(
    rows: list[str], benchmark: ModuleType, tmp_path: Path
) -> None:
    report = tmp_path / "report.md"
    shapes = ["--shapes", "1,40,1", "2,20,2"]
    benchmark.main([*shapes, "--backends", "torch", "fla", *rows, "--output", str(report)])
    lines = report.read_text(encoding="utf-8").splitlines()
    measured = [line.split(" | ") for line in lines if "| torch | " in line and "0, " in line]
    assert len(measured) == 4
    for _, _, forward, backward, rate, *_ in measured:
        assert float(forward) > 0 and float(backward) > 0 and float(rate) > 0
    errors = [line.split(" | ")[1:] for line in lines if line.startswith("| torch | ")]
    assert [len(names) for names in errors] == [9, 8]
    assert all(0 < float(x.strip(" |")) < 1 for names in errors for x in names)
    if not rows:
        assert "Not run: fla needs a GPU." in lines


def test_the_hosts_time_is_that_of_a_call_alone_and_of_one_in_a_row(benchmark: ModuleType) -> None:
    calls: list[bool] = []

    def counted(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(inputs[0].is_leaf)
        return wkv7_chunked(*inputs)

    device = torch.device("cpu")
    for number in (1, 3):
        calls.clear()
        assert benchmark.host_time("wkv7", counted, torch.float32, device, number) > 0
        nothing = benchmark.host_time(
            "wkv7", benchmark._Nothing.apply, torch.float32, device, number
        )
        assert nothing > 0
        assert len(calls) >= 20 * number and calls[:number] == [True] + [False] * (number - 1)


def test_a_backend_over_the_error_budget_is_not_timed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, state = wkv7_reference(*inputs)
        return y * 1.0001, state

    peer = Backend("wrong", lambda: wrong, lambda request: None, "off by a little")
    monkeypatch.setattr(benchmark, "PEERS", {"wkv7": (peer,)})
    benchmark.main(["--ops", "wkv7", "--shapes", "1,40,1", "--backends", "wrong"])
    out = capsys.readouterr().out
    assert "| 1, 40, 1 | wrong | not timed: y: error" in out
    assert "| wrong | 0" not in out


def test_the_kernels_are_not_checked_without_a_gpu() -> None:
    command = [sys.executable, str(BENCHMARKS / "sanitize.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = "error: wkv7, bfloat16, one document: the CUDA backend needs an NVIDIA GPU\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


@pytest.mark.parametrize("method", ["lora", "miss"])
def test_the_control_is_the_adapted_model_that_peft_makes(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu_step = importlib.import_module("gpu_step")

    def model_in_bf16() -> RWKV:
        model: RWKV = gpu_step.make_model("bundled", "torch", torch.device("cpu")).bfloat16()
        return model.requires_grad_(False)

    def trained(model: RWKV) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {n: (p.dtype, p.shape) for n, p in model.named_parameters() if p.requires_grad}

    ours, theirs = model_in_bf16(), model_in_bf16()
    optimizer = gpu_step.make_optimizer(ours, method, is_fused=False, dtype=torch.float32)
    PeftModel(theirs, method_config(method, gpu_step.ADAPTERS[method], "x070"))
    assert trained(ours) == trained(theirs)
    named = dict(ours.named_parameters())
    assert all(named[name] is value for name, value in optimizer.values.items())
    gpu_step.timed_step(ours, optimizer, gpu_step.random_batch(1, 16, 5120))
    assert ours.hidden(torch.ones(1, 16, dtype=torch.int64))[0].dtype == torch.bfloat16


def test_steps_with_adapters_are_timed_beside_pefts_own() -> None:
    small = ["--size", "bundled", "--methods", "miss", "--ctx_len", "16", "--rounds", "1"]
    command = [sys.executable, str(BENCHMARKS / "methods.py"), *small]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    times, work = done.stdout.split("| method |")[-2:]
    timed = [line.split(" | ")[3:] for line in times.splitlines() if "1 × 16" in line]
    assert [len(row) for row in timed] == [6, 6]
    assert all(float(x.strip(" |")) > 0 for row in timed for x in row)
    assert work.count("| nan | nan | nan |") == 8


def test_rows_in_chunks_are_measured_beside_whole_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    infctx = importlib.import_module("infctx")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setitem(infctx.SIZES, "bundled", (2, 64, (8, 8, 8, 8), 320))
    small = ["--size", "bundled", "--op", "torch", "--chunk_ctx", "8", "--compared", "16"]
    line = [*small, "--lengths", "8", "16", "24", "--long", "30", "--long_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["infctx.py", *line, "--output", str(tmp_path / "report.md")])
    infctx.main()
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["chunks"] for row in found["rows"]] == [2, 1, 1, 2, 3, 1, 2, 3, 4]
    assert all(0 <= error < 1e-4 for error in found["errors"].values())
    assert "Exact chunks take " in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_tokens_are_timed_only_where_their_logits_are_those_of_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    generation = importlib.import_module("generation")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["generation.py", "--sizes", "bundled", "--tokens", "2"])
    generation.main()
    (row,) = {x for x in capsys.readouterr().out.splitlines() if x.startswith("| bundled")}
    assert all(float(x) > 0 for x in row.strip("|").split("|")[1:])

    read = generation.Session.read

    def read_another(session: Any, tokens: list[int]) -> None:
        read(session, [token + 1 for token in tokens])

    monkeypatch.setattr(generation.Session, "read", read_another)
    with pytest.raises(SystemExit, match="off those of the whole text"):
        generation.main()


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon of Linux")
def test_merging_takes_less_memory_than_a_layer_and_a_third() -> None:
    sizes = ["--n_layer", "8", "--n_embd", "1024", "--vocab_size", "4096"]
    given = ["--methods", "lora", "--compared", "0", "--json"]
    (found,) = measured_merges(*sizes, *given)
    assert found["is_right"]
    assert 0 < found["peak"] < 1.3 * found["layer"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon of Linux")
@pytest.mark.parametrize("method", ["lora", "miss"])
def test_a_file_of_seven_billion_parameters_is_merged_in_two_minutes(method: str) -> None:
    alone, compared = measured_merges("--methods", method, "--json")
    for found in (alone, compared):
        assert found["is_right"]
        assert 0 < found["peak"] < 1.3 * found["layer"]
    assert alone["seconds"] < 120


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon of Linux")
def test_an_export_holds_a_part_of_the_model_at_a_time() -> None:
    sizes = ["--n_layer", "8", "--n_embd", "1024", "--vocab_size", "4096"]
    rows = measured("export.py", *sizes, "--formats", "gguf", "st", "--json")
    weights = 8 * (12 * 1024**2 + 1024 * 2 * (128 + 128 + 96 + 480)) + 2 * 4096 * 1024
    for found in rows:
        assert found["is_right"]
        # all of it would be two bytes a number
        assert 0 < found["peak"] < weights


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon of Linux")
@pytest.mark.parametrize("form", ["gguf", "st"])
def test_seven_billion_parameters_are_exported_in_less_than_a_gigabyte(form: str) -> None:
    (found,) = measured("export.py", "--formats", form, "--json")
    assert found["is_right"]
    assert 0 < found["peak"] < 1e9


def measured_merges(*arguments: str) -> list[dict[str, Any]]:
    return measured("merge.py", *arguments)


def measured(script: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_memory_that_was_measured_is_that_which_a_run_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    memory = importlib.import_module("memory")
    tables = sorted((BENCHMARKS / "results").glob("memory_*.md"))
    table = "\n".join(path.read_text(encoding="utf-8") for path in tables)
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [row for row in rows if row[0] in ("1.5b", "2.9b", "7.2b", "13.3b")]
    assert len(rows) > 50
    for size, method, kind, _, reserved, _, said, _ in rows:
        guess = memory.predict(
            size,
            method,
            kind.split(",")[0],
            is_small="small" in kind,
            grad_cp=2 if "grad_cp 2" in kind else 1,
            on_host="optimizer_cpu" in kind,
        )
        assert guess == pytest.approx(float(reserved), rel=0.05), (size, method, kind)
        assert f"{guess:.2f}" == said
