"""Several ranks on the CPU learn what one process with the same global batch does."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.checkpoint.tree import read_tree
from rwkv_peft.config import TrainConfig
from rwkv_peft.models.initial import initial_weights
from rwkv_peft.training.run import train
from tests.conftest import make_model_config, older_weights
from tests.processes import become_rank, run_ranks

SIZES = {"n_layer": 2, "n_embd": 64, "dim_att": 64, "dim_ffn": 128}
# versions before the seventh, with the ranks of their low-rank maps
OLDER: dict[str, dict[str, int]] = {"x060": {"maa": 16, "decay": 32}, "x052": {}}
RANKS = 2
# micro-batches of each step on one process, which two ranks have as half of them each
WINDOW = 4
# sums over ranks have another order than those over micro-batches, float32 has 24 bits, and a few
# steps of Adam add some bits to that; this is far below what any wrong weight of a row would do
TOLERANCE = 1e-5
# rows of one to five chunks
CHUNKS: dict[str, Any] = {
    "dataload": "pad",
    "train_type": "infctx",
    "bptt_chunks": "all",
    "chunk_ctx": 16,
    "ctx_len": 80,
}
# what changes from the first configuration, by the name of the folder of the run
CHANGES: dict[str, dict[str, Any]] = {
    # 11 micro-batches an epoch, so that the last step has three, of which a rank has two
    "lora": {"peft": "lora", "peft_config": {"r": 4}, "val_split": 0.2},
    # each rank draws for itself, so that it is compared with itself alone
    "dropout": {"peft": "lora", "peft_config": {"r": 4, "lora_dropout": 0.5}},
    "adalora": {"peft": "adalora", "peft_config": {"init_r": 4, "target_r": 2, "tinit": 1}},
    # begins with a part of the base, which it draws, and leaves the rest, here stored
    "pissa": {"peft": "pissa", "peft_config": {"r": 4}},
    "pissa_nf4": {"peft": "pissa", "peft_config": {"r": 4}, "quant": "nf4"},
    "full": {"peft": "none", "dataload": "pad", "epoch_count": 1},
    "bf16": {"peft": "none", "precision": "bf16", "epoch_count": 1},
    "state": {"peft": "state", "lr_init": 1.0},
    "fsdp": {"peft": "lora", "peft_config": {"r": 4}, "strategy": "fsdp", "val_split": 0.2},
    "fsdp_nf4": {
        # prompts alone, so that the model answers before it is trained or evaluated
        "val_prompts": "prompts.txt",
        "peft": "lora",
        "peft_config": {"r": 4},
        "strategy": "fsdp",
        "quant": "nf4",
        "grad_cp": 1,
    },
    "fsdp_state": {"peft": "state", "lr_init": 1.0, "strategy": "fsdp", "epoch_count": 1},
    # methods that look at weights which are still in the file, and one that changes them
    "fsdp_pissa": {"peft": "pissa", "peft_config": {"r": 4}, "strategy": "fsdp"},
    "fsdp_pissa_nf4": {
        "peft": "pissa",
        "peft_config": {"r": 4},
        "strategy": "fsdp",
        "quant": "nf4",
        "quant_head": 1,
    },
    "fsdp_dora_int8": {
        "peft": "lora",
        "peft_config": {"r": 4, "use_dora": True},
        "strategy": "fsdp",
        "quant": "int8",
        "epoch_count": 1,
    },
    "fsdp_kasa": {
        "peft": "lora",
        "peft_config": {"r": 4, "kasa_config": {}},
        "strategy": "fsdp",
        "epoch_count": 1,
    },
    # a projection of blocks that is trained beside the adapter
    "fsdp_block_parts": {
        "peft": "lora",
        "peft_config": {"r": 4, "target_modules": ["key"]},
        "strategy": "fsdp",
        "train_parts": ["att.value"],
        "epoch_count": 1,
    },
    "fsdp_full": {"peft": "none", "strategy": "fsdp", "val_split": 0.2},
    "fsdp_bf16": {
        "peft": "none",
        "strategy": "fsdp",
        "precision": "bf16",
        "grad_cp": 1,
        "epoch_count": 1,
    },
    "fsdp_compiled": {
        "peft": "none",
        "strategy": "fsdp",
        "compile": 1,
        "grad_cp": 1,
        "epoch_count": 1,
    },
    "fsdp_fp16": {"peft": "none", "strategy": "fsdp", "precision": "fp16", "epoch_count": 1},
    "fsdp_lion": {"peft": "none", "strategy": "fsdp", "optimizer": "lion", "epoch_count": 1},
    # some of it frozen, in blocks and outside
    "fsdp_parts": {
        "peft": "none",
        "strategy": "fsdp",
        "train_parts": ["emb", "time"],
        "val_split": 0.2,
        "val_prompts": "prompts.txt",
    },
    # a backward that goes through no block
    "fsdp_head": {"peft": "none", "strategy": "fsdp", "train_parts": ["head"], "epoch_count": 1},
    "fsdp_lora_parts": {
        "peft": "lora",
        "peft_config": {"r": 4},
        "strategy": "fsdp",
        "train_parts": ["emb", "ln"],
        "epoch_count": 1,
    },
    # with room for whole blocks from their forward to their backward
    "fsdp_room": {"peft": "none", "strategy": "fsdp", "grad_cp": 1, "epoch_count": 1},
    "fsdp_room_infctx": {"peft": "none", "strategy": "fsdp", "epoch_count": 1, **CHUNKS},
    "fsdp_v6": {"peft": "none", "strategy": "fsdp", "load_model": "x060.pth"},
    "fsdp_v5": {"peft": "none", "strategy": "fsdp", "load_model": "x052.pth"},
    "infctx": {"peft": "lora", "peft_config": {"r": 4}, **CHUNKS},
    "fsdp_infctx": {"peft": "none", "strategy": "fsdp", "val_split": 0.2, **CHUNKS},
    "fsdp_infctx_truncated": {
        "peft": "lora",
        "peft_config": {"r": 4},
        "strategy": "fsdp",
        **CHUNKS,
        "bptt_chunks": 1,
    },
    "fsdp_infctx_state": {
        "peft": "state",
        "lr_init": 1.0,
        "strategy": "fsdp",
        **CHUNKS,
    },
}

# those that the default suite takes
FAST = ("lora", "dropout", "full", "state", "fsdp", "fsdp_full")
# those that are taken up again after their third step
RESUMED = ("lora", "dropout", "fsdp", "fsdp_full")
MORE_RESUMED = ("fsdp_pissa", "fsdp_pissa_nf4")
# and that on one process too
ALONE = {"lora", "fsdp_full"}


class Runs(NamedTuple):
    """Where the runs of one process and of two ranks are."""

    alone: Path
    together: Path

    @property
    def resumed(self) -> Path:
        """Those of two ranks, from their checkpoints after the third step."""
        return self.together.with_name("resumed")

    @property
    def resumed_alone(self) -> Path:
        """The same, on one process."""
        return self.together.with_name("resumed_alone")


def make_files(folder: Path) -> TrainConfig:
    generator = torch.Generator().manual_seed(0)
    model_config = make_model_config(**SIZES)
    weights = {
        name: (x + torch.randn(x.shape, generator=generator) * 0.05).bfloat16()
        for name, x in initial_weights(model_config, 0).items()
    }
    write_weights(folder / "base.pth", weights)
    for version, ranks in OLDER.items():
        older = make_model_config(**SIZES, version=version, ranks=ranks)
        found = older_weights(older, generator)
        write_weights(folder / f"{version}.pth", {name: x.bfloat16() for name, x in found.items()})
    rows = [
        {"text": f"row {i}: " + "words and " * (1 + i % 5), "state": "xyz"[i % 3]}
        for i in range(25)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = [{"text": row["text"]} for row in rows]
    (folder / "prompts.txt").write_text("row 1: words\nand")
    (folder / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    return TrainConfig(
        load_model=str(folder / "base.pth"),
        data_file=str(folder / "plain.jsonl"),
        ctx_len=40,
        micro_bsz=2,
        epoch_count=2,
        lr_init=1e-3,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
        merge=0,
        save_every_steps=3,
        keep=0,
    )


def take_rank(rank: int, port: int, configs: Sequence[TrainConfig]) -> None:
    """One of two processes, which runs the configurations one after another."""
    torch.set_num_threads(1)
    for number, config in enumerate(configs):
        become_rank(rank, RANKS, port, number)
        # a CPU does not say what is free
        has_room = "room" in Path(config.proj_dir).name
        with patch("rwkv_peft.training.load.fits_whole", return_value=has_room):
            train(config)


def run_together(configs: Sequence[TrainConfig]) -> None:
    run_ranks(take_rank, RANKS, configs)


def take_runs(folder: Path, names: Sequence[str], resumed: Sequence[str] = ()) -> Runs:
    """Runs of one process and of two ranks, and some that go on from their third step."""
    base = make_files(folder)
    found = Runs(folder / "alone", folder / "together")
    changed = {name: replace(base, **CHANGES[name]) for name in names}
    for name, config in changed.items():
        prompts = config.val_prompts and str(folder / config.val_prompts)
        changed[name] = replace(
            config, load_model=str(folder / config.load_model), val_prompts=prompts
        )
    for name in [x for x in names if CHANGES[x]["peft"] == "state"]:
        changed[name] = replace(changed[name], data_file=str(folder / "data.jsonl"))
    half = {"accumulate_grad_batches": WINDOW // RANKS, "devices": RANKS}
    together = {
        name: replace(config, **half, proj_dir=str(found.together / name))
        for name, config in changed.items()
    }
    again = {
        name: replace(
            together[name],
            proj_dir=str(found.resumed / name),
            resume=str(found.together / name / "checkpoints" / "step-000003"),
        )
        for name in resumed
    }
    run_together([*together.values(), *again.values()])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, config in changed.items():
        proj_dir = str(found.alone / name)
        train(replace(config, proj_dir=proj_dir, accumulate_grad_batches=WINDOW))
    for name in ALONE & again.keys():
        alone = {"proj_dir": str(found.resumed_alone / name), "devices": 1}
        train(replace(again[name], **alone, resume_changes=["devices"]))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return take_runs(tmp_path_factory.mktemp("runs"), FAST, RESUMED)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    names = [n for n in CHANGES if n not in FAST]
    return take_runs(tmp_path_factory.mktemp("more"), names, MORE_RESUMED)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(folder: Path) -> dict[str, Tensor]:
    """The float32 values of what is trained, in the last checkpoint."""
    checkpoint = max(folder.glob("checkpoints/step-*"))
    values: dict[str, Tensor] = read_tree(checkpoint)["run"]["optimizer"]["values"]
    return values


def saved_files(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("rwkv-*")):
        if path.is_dir():
            tensors = load_file(path / "adapter_model.safetensors")
        else:
            tensors = dict(read_weights(path))
        found |= {f"{path.name}/{n}": x for n, x in tensors.items()}
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm()) if wanted.any() else float(found.norm())


def assert_near(found: float, wanted: float, tolerance: float) -> None:
    assert abs(found - wanted) <= tolerance * abs(wanted)


@pytest.mark.parametrize("name", [n for n in FAST if n != "dropout"])
def test_two_ranks_learn_what_one_process_with_the_same_global_batch_does(
    name: str, runs: Runs
) -> None:
    assert_equal(name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CHANGES if n not in FAST])
def test_two_ranks_learn_the_same_by_other_ways_too(name: str, more_runs: Runs) -> None:
    assert_equal(name, more_runs)


def assert_equal(name: str, runs: Runs) -> None:
    # a weight of bf16 may round otherwise after a step, which is a change of 2 ** -8 in it
    tolerance = 2**-8 if CHANGES[name].get("precision") == "bf16" else TOLERANCE
    alone, together = (read_lines(x / name / "loss_data.jsonl") for x in runs)
    assert len(alone) == len(together) >= 3
    for one, two in zip(alone, together, strict=True):
        for key in ("step", "epoch", "tokens", "trained_tokens", "lr"):
            assert one[key] == two[key]
        assert_near(two["loss"], one["loss"], tolerance)
        assert_near(two["grad_norm"], one["grad_norm"], 10 * tolerance)
    wanted, found = (learned(x / name) for x in runs)
    assert wanted.keys() == found.keys() and wanted
    for key, x in wanted.items():
        assert distance(found[key], x) <= tolerance, key
    wanted, found = (saved_files(x / name) for x in runs)
    assert wanted.keys() == found.keys() and wanted
    for key, x in wanted.items():
        assert (found[key].shape, found[key].dtype) == (x.shape, x.dtype)
        # a value may lie between two numbers of bf16
        assert distance(found[key], x) <= max(tolerance, 2**-8 * (x.dtype == torch.bfloat16)), key


@pytest.mark.parametrize("name", ["lora", "fsdp_full"])
def test_ranks_share_the_documents_of_an_evaluation(name: str, runs: Runs) -> None:
    alone, together = (read_lines(x / name / "val_data.jsonl") for x in runs)
    assert len(alone) == len(together) >= 3
    for one, two in zip(alone, together, strict=True):
        assert (one["step"], one["tokens"], one["is_best"]) == (
            two["step"],
            two["tokens"],
            two["is_best"],
        )
        assert_near(two["loss"], one["loss"], TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp_parts", "fsdp_nf4"])
def test_ranks_that_share_a_model_answer_prompts_together(name: str, more_runs: Runs) -> None:
    alone, together = (read_lines(x / name / "val_samples.jsonl") for x in more_runs)
    assert len(alone) >= 4 and alone == together


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_is_resumed_on_as_many_ranks_ends_with_the_same_bits(
    name: str, runs: Runs
) -> None:
    assert_resumed(name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RESUMED)
def test_a_residual_is_that_of_the_run_that_is_resumed(name: str, more_runs: Runs) -> None:
    assert_resumed(name, more_runs)


def assert_resumed(name: str, runs: Runs) -> None:
    wanted, found = (learned(x / name) for x in (runs.together, runs.resumed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], x) for key, x in wanted.items())


@pytest.mark.parametrize("name", sorted(ALONE))
def test_a_run_goes_on_on_another_number_of_ranks_with_the_same_rows_in_each_step(
    name: str,
    runs: Runs,
) -> None:
    wanted, found = (
        read_lines(x / name / "loss_data.jsonl") for x in (runs.together, runs.resumed_alone)
    )
    assert [x["tokens"] for x in found] == [x["tokens"] for x in wanted]
    values = learned(runs.resumed_alone / name)
    for key, x in learned(runs.together / name).items():
        assert distance(values[key], x) <= TOLERANCE, key


def test_ranks_draw_different_numbers(runs: Runs) -> None:
    checkpoint = max((runs.together / "dropout").glob("checkpoints/step-*"))
    first, second = read_tree(checkpoint)["run"]["random"]
    assert not torch.equal(first["cpu"], second["cpu"])
