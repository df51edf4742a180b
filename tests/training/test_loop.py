import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import read_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError, TrainingError
from rwkv_peft.training import choose_device
from rwkv_peft.training.run import train
from rwkv_peft.training.step import StepOutput, full_step

Run = Callable[..., Any]


@pytest.fixture
def run(model_file: Path, data_file: Path, tmp_path: Path) -> Run:
    """Trains two epochs of LoRA on the small files, with changes."""
    base = TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        peft="lora",
        peft_config={"r": 4},
        dataload="pad",
        epoch_count=2,
        micro_bsz=4,
        ctx_len=32,
        lr_init=1e-3,
        lr_final=1e-3,
        warmup_steps=0,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
    )

    def start(step: Any = full_step, **changes: Any) -> Any:
        return train(replace(base, **changes), step=step)

    return start


def losses(folder: Path) -> list[float]:
    lines = (folder / "loss_data.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def adapter_of(result: Any) -> dict[str, torch.Tensor]:
    return read_adapter(result.adapter).tensors


def test_training_lowers_the_loss_and_writes_the_run_folder(run: Run, tmp_path: Path) -> None:
    result = run(epoch_count=6)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["config.yaml", "loss_data.jsonl", "merge_report.json", "train_log.txt"]
        + [f"rwkv-{k}{end}" for k in range(6) for end in (".pth", "-adapter")]
    )
    values = losses(tmp_path / "out")
    assert len(values) == result.steps
    assert values[-1] < 0.9 * values[0]
    record = json.loads((tmp_path / "out" / "loss_data.jsonl").read_text().splitlines()[0])
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens"} <= set(record)
    assert {"t_cost", "kt_s", "peak_memory"} <= set(record)
    log = (tmp_path / "out" / "train_log.txt").read_text()
    assert "12 documents" in log and "epoch 5: loss" in log


def test_the_merged_file_gives_the_official_runtime_the_adapter_models_logits(
    run: Run, make_model_file: Callable[..., Path], official_logits: Callable[..., torch.Tensor]
) -> None:
    base = make_model_file("float.pth", dtype=torch.float32)
    result = run(load_model=str(base))
    tokens = list(range(1, 40))
    with torch.inference_mode():
        adapted = rwkv_peft.load_model(base, adapter=result.adapter)(torch.tensor([tokens]))[0][0]
        plain = rwkv_peft.load_model(base)(torch.tensor([tokens]))[0][0]
    assert (adapted - plain).abs().max() > 1e-2
    official = official_logits(result.weights, tokens)
    torch.testing.assert_close(official, adapted, rtol=0, atol=1e-4)
    before, after = read_weights(base), read_weights(result.weights)
    assert list(before) == list(after)
    touched = {n for n in before if not torch.equal(before[n], after[n])}
    suffixes = ("receptance", "key", "value", "output")
    assert touched == {n for n in before if n.split(".")[-2] in suffixes}


@pytest.mark.parametrize("dataload", ["pad", "pack", "get"])
@pytest.mark.parametrize(("micro_bsz", "accumulate"), [(2, 4), (1, 8)])
def test_splitting_a_step_into_micro_batches_does_not_change_it(
    micro_bsz: int, accumulate: int, dataload: str, run: Run, tmp_path: Path
) -> None:
    settings = {"dataload": dataload, "ctx_len": 1000 if dataload == "pad" else 48}
    whole = run(micro_bsz=8, proj_dir=str(tmp_path / "whole"), **settings)
    split = run(
        micro_bsz=micro_bsz,
        accumulate_grad_batches=accumulate,
        proj_dir=str(tmp_path / "split"),
        **settings,
    )
    assert split.steps == whole.steps == 4
    assert losses(split.proj_dir) == pytest.approx(losses(whole.proj_dir), rel=1e-6)
    for name, value in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(split)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dataload", ["pad", "pack"])
def test_split_and_whole_gradients_agree_to_a_millionth(
    dataload: Any, model_file: Path, data_file: Path
) -> None:
    from rwkv_peft.config import DataConfig
    from rwkv_peft.data.batching import Batches
    from rwkv_peft.data.prepare import read_documents
    from rwkv_peft.methods.attach import attach

    documents = read_documents(DataConfig(data_file=str(data_file)), rwkv_peft.Tokenizer(320))
    gradients = []
    for micro_bsz in (8, 4, 1):
        batches = Batches(
            documents,
            dataload=dataload,
            ctx_len=1000 if dataload == "pad" else 90,
            micro_bsz=micro_bsz,
            seed=0,
            is_shuffled=False,
        )
        torch.manual_seed(0)
        model = rwkv_peft.load_model(model_file)
        trained = attach(model, "lora", {"r": 4, "init_lora_weights": False})
        micro_batches = [batches[i] for i in range(8 // micro_bsz)]
        assert micro_bsz > 1 or len({b.num_trained for b in micro_batches}) > 3
        count = sum(b.num_trained for b in micro_batches)
        for batch in micro_batches:
            full_step(model, batch, divisor=count, l2wrap=1e-4, backward=torch.Tensor.backward)
        gradients.append({n: p.grad for n, p in trained.items()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient is not None and other[name] is not None
            error = (other[name] - gradient).norm() / gradient.norm()
            assert error < 1e-6, name


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_recomputing_blocks_changes_nothing(peft: str, run: Run, tmp_path: Path) -> None:
    settings = {"peft": peft, "peft_config": {} if peft == "none" else {"r": 4}}
    plain = run(grad_cp=0, proj_dir=str(tmp_path / "plain"), **settings)
    recomputed = run(grad_cp=1, proj_dir=str(tmp_path / "recomputed"), **settings)
    one, other = read_weights(plain.weights), read_weights(recomputed.weights)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_recomputing_draws_the_same_dropout(run: Run, tmp_path: Path) -> None:
    options = {"r": 4, "lora_dropout": 0.3}
    plain = run(grad_cp=0, proj_dir=str(tmp_path / "plain"), peft_config=options)
    recomputed = run(grad_cp=1, proj_dir=str(tmp_path / "recomputed"), peft_config=options)
    assert losses(plain.proj_dir) == losses(recomputed.proj_dir)
    without = run(proj_dir=str(tmp_path / "without"))
    assert losses(without.proj_dir) != losses(plain.proj_dir)


def test_inputs_that_wait_on_the_host_change_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # here they are copied to other memory of the same device
    monkeypatch.setattr(choose_device, "has_host_memory", lambda device: True)
    dropout = {"r": 4, "lora_dropout": 0.3}
    options: dict[str, Any] = {"peft_config": dropout, "accumulate_grad_batches": 2}
    here = run(grad_cp=1, proj_dir=str(tmp_path / "here"), **options)
    there = run(grad_cp=2, proj_dir=str(tmp_path / "there"), **options)
    assert losses(here.proj_dir) == losses(there.proj_dir)
    one, other = read_weights(here.weights), read_weights(there.weights)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_adapter_is_trained_further_from_where_it_was(
    precision: str, run: Run, tmp_path: Path
) -> None:
    first = run(epoch_count=4, lr_init=1e-2, precision=precision, proj_dir=str(tmp_path / "first"))
    # a rate at which nothing moves shows the values it begins with
    settings = {"peft_config": {}, "load_adapter": str(first.adapter), "precision": precision}
    still = run(**settings, lr_init=1e-30, lr_final=0.0, proj_dir=str(tmp_path / "still"))
    before, after = adapter_of(first), adapter_of(still)
    assert all(torch.equal(before[name], after[name]) for name in before)
    more = run(**settings, epoch_count=4, lr_init=1e-2, proj_dir=str(tmp_path / "more"))
    assert losses(more.proj_dir)[0] < losses(first.proj_dir)[0] - 0.3
    assert losses(more.proj_dir)[-1] < losses(first.proj_dir)[-1]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run: Run, tmp_path: Path) -> None:
    results = [run(random_seed=s, proj_dir=str(tmp_path / f"{i}")) for i, s in enumerate((1, 1, 2))]
    one, again, other = [adapter_of(r) for r in results]
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_full_tuning_moves_every_tensor_that_is_read_and_keeps_the_rest(
    run: Run, make_model_file: Callable[..., Path]
) -> None:
    base = make_model_file("full.pth", dtype=torch.float32, has_first_value_mix=True)
    result = run(load_model=str(base), peft="none", peft_config={})
    before, after = read_weights(base), read_weights(result.weights)
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert same == {f"blocks.0.att.v{i}" for i in range(3)}
    assert result.adapter is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_saves_finite_masters(precision: str, run: Run) -> None:
    result = run(precision=precision, epoch_count=6)
    values = losses(result.proj_dir)
    assert values[-1] < 0.9 * values[0]
    for value in adapter_of(result).values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()


def test_epoch_steps_stops_an_epoch_early_and_the_next_goes_on_there(
    run: Run, tmp_path: Path
) -> None:
    seen: list[int] = []

    def watching(model: Any, batch: Any, **options: Any) -> StepOutput:
        seen.extend(batch.lines)
        return full_step(model, batch, **options)

    run(watching, epoch_steps=2, epoch_count=3, micro_bsz=2, ctx_len=1000)
    assert sorted(seen) == list(range(1, 13))
    log = (tmp_path / "out" / "train_log.txt").read_text()
    assert "the run makes 1.00 passes over the data" in log


def test_weights_are_saved_every_so_many_epochs_and_after_the_last(run: Run) -> None:
    result = run(epoch_count=5, epoch_save=2, epoch_begin=10, merge=0)
    names = sorted(p.name for p in result.proj_dir.iterdir() if p.name.startswith("rwkv"))
    assert names == ["rwkv-11-adapter", "rwkv-13-adapter", "rwkv-14-adapter"]
    assert result.weights is None


def test_a_loss_that_is_no_number_stops_and_names_the_rows(run: Run, tmp_path: Path) -> None:
    calls = 0

    def failing(model: Any, batch: Any, **options: Any) -> StepOutput:
        nonlocal calls
        calls += 1
        output = full_step(model, batch, **options)
        bad = torch.tensor(math.nan)
        return output._replace(loss_sum=bad) if calls == 2 else output

    with pytest.raises(
        TrainingError, match=r"loss is nan at step 2, in the rows from lines [\d, ]+"
    ):
        run(failing)
    assert not list((tmp_path / "out").glob("rwkv-*"))
    assert len(losses(tmp_path / "out")) == 1


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(
    run: Run, tmp_path: Path
) -> None:
    def failing(model: Any, batch: Any, **options: Any) -> StepOutput:
        backward = options.pop("backward")
        return full_step(model, batch, backward=lambda x: backward(x * math.inf), **options)

    with pytest.raises(TrainingError, match=r"the gradient is (nan|inf) at step 1"):
        run(failing)
    assert not list((tmp_path / "out").glob("rwkv-*"))


def test_running_out_of_memory_says_what_to_lower(run: Run) -> None:
    def failing(model: Any, batch: Any, **options: Any) -> StepOutput:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match=r"out of memory at step 1, with 4 rows of \d+ tokens"):
        run(failing)


def test_a_saved_config_repeats_the_run(run: Run, tmp_path: Path, cli: Callable[..., Any]) -> None:
    first = run()
    config = tmp_path / "out" / "config.yaml"
    done = cli("train", "--config", config, "--proj_dir", tmp_path / "again")
    assert done.code == 0
    again = read_adapter(tmp_path / "again" / "rwkv-1-adapter").tensors
    assert all(torch.equal(again[n], x) for n, x in adapter_of(first).items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(
    number: signal.Signals,
    model_file: Path,
    make_data_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # an epoch too long to end meanwhile: what it saves would not be saved twice
    data_file = make_data_file([f"row {i} of many" for i in range(5000)])
    command = [sys.executable, "-m", "rwkv_peft.cli.main", "train", str(model_file)]
    command += [str(data_file), "--proj_dir", str(tmp_path / "out"), "--epoch_count", "100000"]
    command += ["--peft", "lora", "--micro_bsz", "1", "--dataload", "pad"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    path = tmp_path / "out" / "loss_data.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    steps = len(losses(tmp_path / "out"))
    folder = tmp_path / "out" / "checkpoints" / f"step-{steps:06d}"
    assert f"stopped by signal {int(number)} after step {steps}" in errors
    merged = read_weights(folder / "rwkv.pth")
    assert list(merged) == list(read_weights(model_file))
    config = read_adapter(folder / "rwkv-adapter").config
    assert config.r == 32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adalora_learns_and_gives_up_ranks(precision: str, run: Run) -> None:
    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}
    result = run(peft="adalora", peft_config=options, precision=precision, epoch_count=4, merge=0)
    factors = [x for n, x in adapter_of(result).items() if ".lora_E" in n]
    kept = sum(int(x.count_nonzero()) for x in factors)
    assert kept == 2 * len(factors)


def test_the_speed_counts_the_time_of_making_batches(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_peft.data.batching import Batches

    make = Batches.__getitem__

    def make_slowly(self: Batches, position: int) -> Any:
        time.sleep(0.2)
        return make(self, position)

    monkeypatch.setattr(Batches, "__getitem__", make_slowly)
    result = run(epoch_count=1, accumulate_grad_batches=2)
    lines = (result.proj_dir / "loss_data.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["t_cost"] >= 0.4
    assert all(r["kt_s"] == pytest.approx(r["tokens"] / r["t_cost"] / 1000) for r in records)


def test_nothing_of_a_micro_batch_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []

    def counting(model: Any, batch: Any, **options: Any) -> StepOutput:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__"):
                read = getattr(torch.Tensor, name)
                patch.setattr(
                    torch.Tensor,
                    name,
                    lambda x, read=read: waits.append(x.is_floating_point()) or read(x),
                )
            output = full_step(model, batch, **options)
        return output

    run(counting, epoch_count=1, op="torch")
    # integers of the batch lie on the host; all else may be on a device that is still at work
    assert not any(waits)


NOTE = "nothing was learned"
# what is trained, at a rate that moves nothing, or in no step at all
STILL: dict[str, dict[str, Any]] = {
    "a tiny rate": {"lr_init": 1e-30, "lr_final": 1e-30},
    "a tiny rate, unmerged": {"lr_init": 1e-30, "lr_final": 0.0, "merge": 0},
    "a tiny rate in bf16": {"lr_init": 1e-30, "lr_final": 0.0, "precision": "bf16"},
    "rate 0": {"lr_init": 0.0, "lr_final": 0.0},
    "rate 0 of all weights": {"lr_init": 0.0, "lr_final": 0.0, "peft": "none", "peft_config": {}},
    "rate 0 of a state": {"lr_init": 0.0, "lr_final": 0.0, "peft": "state", "peft_config": {}},
    "no epoch": {"epoch_count": 0},
    "no epoch of pissa": {"epoch_count": 0, "peft": "pissa"},
    "no epoch of adalora": {"epoch_count": 0, "peft": "adalora", "peft_config": {}},
    "no epoch of all weights": {"epoch_count": 0, "peft": "none", "peft_config": {}},
}


@pytest.mark.parametrize("case", STILL)
def test_a_run_that_learns_nothing_saves_and_says_so(case: str, run: Run, tmp_path: Path) -> None:
    result = run(**{"epoch_count": 1, **STILL[case]})
    assert NOTE in (tmp_path / "out" / "train_log.txt").read_text()
    if result.weights and "state" not in case and "pissa" not in case:
        before = read_weights(tmp_path / "base.pth")
        after = read_weights(result.weights)
        assert all(torch.equal(x, after[name]) for name, x in before.items())
    if "epoch" in case:
        assert result.steps == 0


def test_a_run_that_learns_says_nothing_of_that(run: Run, tmp_path: Path) -> None:
    run(epoch_count=1)
    assert NOTE not in (tmp_path / "out" / "train_log.txt").read_text()


def test_a_gradient_of_zero_in_the_first_step_ends_the_run(
    run: Run, data_file: Path, tmp_path: Path
) -> None:
    def still(*args: Any, backward: Any, **more: Any) -> StepOutput:
        return full_step(*args, backward=lambda x: backward(0 * x), **more)

    with pytest.raises(TrainingError, match=r"first step is zero: blocks\.0\.att.* and 21 more"):
        run(step=still)
    # rows of an embedding have no gradient where their tokens are not in the step
    config = {"token_indices": [319]}
    run(step=still, peft="trainable_tokens", peft_config=config, proj_dir=str(tmp_path / "rows"))


def test_kasa_adds_its_penalty_to_the_gradient(run: Run, tmp_path: Path) -> None:
    norms = []
    for beta in (0.0, 1.0):
        folder = tmp_path / f"{beta}"
        options = {"r": 4, "kasa_config": {"beta": beta, "gamma": 0.0}}
        run(peft_config=options, proj_dir=str(folder), epoch_count=1)
        norms.append(
            json.loads((folder / "loss_data.jsonl").read_text().split("\n")[0])["grad_norm"]
        )
    assert norms[1] > norms[0] + 1


@pytest.mark.parametrize("dataload", ["pack", "get"])
@pytest.mark.parametrize("ctx_len", [10**12, 2**63 - 1])
def test_a_row_that_no_machine_has_room_for_is_refused_before_anything_is_made(
    dataload: Any, ctx_len: int, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        dataload=dataload,
        ctx_len=ctx_len,
    )
    with pytest.raises(ConfigError, match=f"--ctx_len {ctx_len} with --micro_bsz 1: .*--dataload"):
        train(config)
    assert not (tmp_path / "out").exists()
