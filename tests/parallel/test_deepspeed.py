"""What the stages of DeepSpeed learn on two ranks is what one process does.

Each optimizer step has two micro-batches on each rank, and but for full tuning and states frozen
tensors beside the trained ones. The last step of an epoch has three micro-batches, so that one rank
has nothing to do in its second.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rwkv_peft.checkpoint.tree import find_damage
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.deepspeed import DeepSpeed, Trained
from rwkv_peft.parallel.strategy import Ddp
from rwkv_peft.parallel.world import World
from rwkv_peft.training.run import train
from tests.cli.test_ranks import find_rank, started
from tests.training.test_devices import (
    RANKS,
    TOLERANCE,
    WINDOW,
    Runs,
    assert_near,
    distance,
    learned,
    make_files,
    read_lines,
    run_together,
    saved_files,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: pip install 'rwkv-peft[deepspeed]', on Linux",
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux"),
]

LORA: dict[str, Any] = {"peft": "lora", "peft_config": {"r": 4}}
# what the first configuration is changed by, without the strategy
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "val_split": 0.2},
    # two factors of the rate, decay, and gradients that are clipped in each step
    "full": {
        "peft": "none",
        "dataload": "pad",
        "epoch_count": 1,
        "weight_decay": 0.1,
        "layerwise_lr": 1,
        "grad_clip": 0.1,
    },
    "state": {"peft": "state", "lr_init": 1.0, "epoch_count": 1},
    "bf16": {"peft": "none", "precision": "bf16", "epoch_count": 1},
    "lora_bf16": {**LORA, "precision": "bf16"},
    # as many backwards as a row has chunks
    "infctx": {
        **LORA,
        "dataload": "pad",
        "train_type": "infctx",
        "bptt_chunks": "all",
        "chunk_ctx": 16,
        "ctx_len": 80,
    },
    # chunks that bring nothing that is trained a gradient
    "infctx_state": {
        "peft": "state",
        "dataload": "pad",
        "bptt_chunks": "all",
        "chunk_ctx": 16,
        "ctx_len": 80,
        "epoch_count": 1,
    },
    "nf4": {**LORA, "quant": "nf4", "epoch_count": 1},
    # a penalty beside the loss
    "kasa": {"peft": "lora", "peft_config": {"r": 4, "kasa_config": {}}, "epoch_count": 1},
    # trained outside of blocks too, and blocks that go forward again in backward
    "parts": {
        **LORA,
        "train_parts": ["emb", "head", "time"],
        "grad_cp": 1,
        "val_prompts": "prompts.txt",
    },
}
FAST = ("2 lora", "3 full")
SLOW = (
    *(f"{stage} {what}" for stage in "13" for what in ("lora", "state", "bf16", "parts")),
    *("1 full", "2 full", "2 state", "2 bf16", "2 lora_bf16", "3 lora_bf16"),
    *(f"{stage} {what}" for stage in "123" for what in ("infctx", "infctx_state")),
    *("1 nf4", "2 nf4", "1 kasa", "2 kasa"),
    *("1_offload full", "2_offload lora", "2_offload full", "2_offload state", "2_offload bf16"),
    *("3_offload lora", "3_offload full", "3_offload bf16"),
)
RESUMED = ("1 lora", "1 bf16", "2 bf16", "3 lora", "3 parts", "2_offload full", "3_offload bf16")


def take_runs(folder: Path, names: Sequence[str], resumed: Sequence[str]) -> Runs:
    """Runs of one process and of two ranks, and some that go on from their third step."""
    base, found = make_files(folder), Runs(folder / "alone", folder / "together")
    half = {"accumulate_grad_batches": WINDOW // RANKS, "devices": RANKS}
    changes = {what: dict(found) for what, found in CHANGES.items()}
    changes["parts"]["val_prompts"] = str(folder / CHANGES["parts"]["val_prompts"])

    def config(name: str) -> TrainConfig:
        stage, what = name.split()
        shared = {"strategy": f"deepspeed_stage_{stage}", "proj_dir": str(found.together / name)}
        return replace(base, **{**changes[what], **half, **shared})

    configs = [config(name) for name in names]
    for name in resumed:
        start = found.together / name / "checkpoints" / "step-000003"
        again = replace(config(name), proj_dir=str(found.resumed / name), resume=str(start))
        configs.append(again)
    run_together(configs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for what in sorted({name.split()[1] for name in names}):
        alone = {"accumulate_grad_batches": WINDOW, "proj_dir": str(found.alone / what)}
        train(replace(base, **{**changes[what], **alone}))
    if resumed:
        # by another strategy, on another number of ranks
        again = config(resumed[0])
        start = found.together / resumed[0] / "checkpoints" / "step-000003"
        alone = {"proj_dir": str(found.resumed_alone), "devices": 1, "strategy": "auto"}
        train(replace(again, **alone, resume=str(start), resume_changes=["devices"]))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return take_runs(tmp_path_factory.mktemp("runs"), FAST, FAST[1:])


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return take_runs(tmp_path_factory.mktemp("more"), SLOW, RESUMED)


@pytest.mark.parametrize("name", FAST)
def test_a_stage_learns_what_one_process_with_the_same_global_batch_does(
    name: str, runs: Runs
) -> None:
    assert_equal(name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_all_stages_learn_what_one_process_does(name: str, more_runs: Runs) -> None:
    assert_equal(name, more_runs)


def assert_equal(name: str, runs: Runs) -> None:
    what = name.split()[1]
    # a weight of bf16 may round otherwise after a step, which is a change of 2 ** -8 in it
    tolerance = 2**-8 if what.endswith("bf16") else TOLERANCE
    folders = runs.alone / what, runs.together / name
    alone, together = (read_lines(x / "loss_data.jsonl") for x in folders)
    assert len(alone) == len(together) >= 3
    for one, two in zip(alone, together, strict=True):
        for key in ("step", "epoch", "tokens", "trained_tokens", "lr"):
            assert one[key] == two[key]
        assert_near(two["loss"], one["loss"], tolerance)
        assert_near(two["grad_norm"], one["grad_norm"], tolerance)
    wanted, found = (learned(x) for x in folders)
    assert wanted.keys() == found.keys() and wanted
    for key, x in wanted.items():
        assert found[key].dtype == x.dtype == torch.float32
        assert distance(found[key], x) <= tolerance, key
    wanted, found = (saved_files(x) for x in folders)
    assert wanted.keys() == found.keys() and wanted
    for key, x in wanted.items():
        assert (found[key].shape, found[key].dtype) == (x.shape, x.dtype)
        # a value may lie between two numbers of bf16
        assert distance(found[key], x) <= max(tolerance, 2**-8 * (x.dtype == torch.bfloat16)), key


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_ranks_answer_prompts_as_one_process_does(stage: str, more_runs: Runs) -> None:
    folders = more_runs.alone / "parts", more_runs.together / f"{stage} parts"
    alone, together = (read_lines(x / "val_samples.jsonl") for x in folders)
    assert len(alone) >= 4 and alone == together


@pytest.mark.parametrize("name", FAST[1:])
def test_a_stage_that_is_resumed_ends_with_the_same_bits(name: str, runs: Runs) -> None:
    assert_same_bits(name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_all_stages_that_are_resumed_end_with_the_same_bits(name: str, more_runs: Runs) -> None:
    assert_same_bits(name, more_runs)


def assert_same_bits(name: str, runs: Runs) -> None:
    wanted, found = (learned(x / name) for x in (runs.together, runs.resumed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], x) for key, x in wanted.items())


def test_one_process_goes_on_from_the_checkpoint_of_a_stage(runs: Runs) -> None:
    values = learned(runs.resumed_alone)
    for key, x in learned(runs.together / FAST[1]).items():
        assert distance(values[key], x) <= TOLERANCE, key


def make_strategy(name: str, rank: int = 0, size: int = 2) -> DeepSpeed:
    return DeepSpeed(Ddp(World(rank, rank, size, size, "127.0.0.1", 1, True)), name)


def make_trained(tensors: dict[str, nn.Parameter]) -> Trained:
    return Trained(tensors, {(1.0, False): list(tensors)}, torch.optim.AdamW, 1.0)


def test_tensors_of_two_types_are_refused() -> None:
    strategy = make_strategy("deepspeed_stage_1")
    strategy.trained = make_trained(
        {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2).bfloat16())}
    )
    with pytest.raises(ConfigError, match=r"stage_1 .* of torch.bfloat16, torch.float32: use"):
        strategy.shard(nn.Module(), (), ())


def test_a_tensor_that_several_blocks_train_is_refused_in_stage_3() -> None:
    strategy = make_strategy("deepspeed_stage_3_offload")
    blocks = [nn.Linear(2, 2) for _ in range(2)]
    blocks[1].weight = blocks[0].weight
    strategy.trained = make_trained({"bank": blocks[0].weight})
    with pytest.raises(ConfigError, match="stage_3_offload takes a block at a time, and bank is"):
        strategy.shard(nn.Module(), blocks, ())


def test_the_last_part_of_a_tensor_that_does_not_divide_ends_with_zeros() -> None:
    # as DeepSpeed shares out 8 numbers among 3
    parameter, value = SimpleNamespace(ds_tensor=torch.zeros(3)), torch.arange(8.0).view(2, 4)
    parts = [
        make_strategy("deepspeed_stage_3", rank, 3)._part(parameter, value) for rank in range(3)
    ]
    assert [x.tolist() for x in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    # and one number among 3
    parameter = SimpleNamespace(ds_tensor=torch.zeros(1))
    last = make_strategy("deepspeed_stage_3", 2, 3)._part(parameter, torch.ones(1))
    assert last.tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3_offload"])
def test_a_rank_that_is_killed_ends_all_with_one_message(
    stage: str,
    make_model_file: Callable[..., Path],
    make_data_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = make_model_file(n_layer=1, n_embd=64, dim_att=64, dim_ffn=64)
    data, folder = make_data_file(["some words"] * 8), tmp_path / "out"
    flags = {
        "proj_dir": folder,
        "devices": 2,
        "strategy": f"deepspeed_stage_{stage}",
        "accelerator": "cpu",
        "precision": "fp32",
        "peft": "lora",
        "dataload": "pad",
        "micro_bsz": 1,
        "epoch_count": 100_000,
        "epoch_save": 100_000,
        "save_every_steps": 5,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "rwkv_peft.cli.main", "train", str(model), str(data), *words]
    with started(command, folder) as run:
        os.kill(find_rank(run.pid, 1), signal.SIGKILL)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 2
    errors = [line for line in told.splitlines() if "error" in line or "Traceback" in line]
    assert len(errors) == 1 and "rank 1 of 2" in errors[0] and "--resume auto" in errors[0]
    checkpoint = max(folder.glob("checkpoints/step-*"))
    assert not find_damage(checkpoint)
    epochs = str((int(checkpoint.name.removeprefix("step-")) + 3) // 4 + 1)
    again = [*command, "--resume", "auto", "--epoch_count", epochs]
    again += ["--resume_changes", "epoch_count,warmup_steps"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stderr
