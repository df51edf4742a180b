"""What is said where memory is short."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training import memory
from rwkv_peft.training.advice import advise_memory
from rwkv_peft.training.choose import choose
from rwkv_peft.training.prepare import find_facts
from rwkv_peft.training.settings import Facts, Settings


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: 64 << 30)


@pytest.fixture
def found(model_file: Path, data_file: Path) -> tuple[Settings, Facts]:
    config = TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        accelerator="cpu",
        precision="bf16",
        ctx_len=64,
        micro_bsz=4,
        grad_cp=0,
        optimizer="adamw",
    )
    facts = find_facts(config, read_weights(config.load_model))
    settings = replace(choose(config, facts).settings, emb_cpu=0, optimizer_cpu=0)
    return settings, replace(facts, device=torch.device("cuda"))


# a model of 7.2B in bf16, its LoRA of rank 64, and what training it takes by hand: weights 14.4e9
# bytes, an adapter of 151e6 numbers at 14 + 2 bytes and less
SHAPE = {"n_layer": 32, "n_embd": 4096, "dim_att": 4096, "dim_ffn": 16384, "vocab_size": 65536}
NUM_WEIGHTS, NUM_TRAINED = 7_199_000_000, 150_994_944


ON_HOST = "--grad_cp 2 --emb_cpu 1 --optimizer adamw8bit --optimizer_cpu 1"


def advise(found: tuple[Settings, Facts], gib: float, **changes: Any) -> str | None:
    settings, facts = found
    ranks = {"w": 128, "a": 128, "v": 96, "g": 480}
    config = replace(facts.model_config, **SHAPE, ranks=ranks)
    facts = replace(facts, memory=int(gib * 2**30), model_config=config)
    settings = replace(settings, ctx_len=1024, micro_bsz=1, **changes)
    return advise_memory(settings, facts, "cuda", NUM_WEIGHTS, NUM_TRAINED)


def test_where_memory_is_enough_nothing_is_said(found: tuple[Settings, Facts]) -> None:
    assert advise(found, 80.0) is None
    assert advise((found[0], found[1]), 16.5, grad_cp=1) is None


@pytest.mark.parametrize(
    ("gib", "flags"),
    [
        (24, "--grad_cp 1 "),
        (16.0, "--grad_cp 1 --emb_cpu 1 "),
        (15.5, "--grad_cp 2 --emb_cpu 1 "),
        (15, "--grad_cp 2 --emb_cpu 1 --optimizer adamw8bit "),
        (14.5, f"{ON_HOST} "),
        (9, f"{ON_HOST} --quant int8 --quant_head 1 "),
        (6, f"{ON_HOST} --quant nf4 --quant_head 1 "),
        (5.0, f"{ON_HOST} --quant nf4_nested --quant_head 1 "),
    ],
)
def test_as_little_is_changed_as_makes_it_fit(
    gib: float, flags: str, found: tuple[Settings, Facts]
) -> None:
    line = advise(found, gib)
    assert line is not None
    said, _, about = line.partition("it takes about ")
    assert said == f"memory: {gib:.1f} GiB are free, and the run may not fit; with {flags}"
    assert float(about) <= gib + 0.05


def test_what_cannot_be_is_not_advised(
    found: tuple[Settings, Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = advise(found, 4.0, train_parts=["emb"])
    assert line is not None and "--quant" not in line and "--emb_cpu" not in line
    line = advise(found, 4.0, optimizer="lion")
    assert (
        line is not None
        and "--optimizer " not in line
        and "--quant nf4_nested --quant_head 1" in line
    )
    settings, facts = found
    line = advise((settings, replace(facts, device=torch.device("cpu"))), 4.0)
    assert line is not None and "_cpu" not in line and "--grad_cp 1 " in line
    # what is on the host takes nothing that fewer bits would spare
    line = advise(found, 4.0, optimizer_cpu=1)
    assert line is not None and "--optimizer" not in line and "--quant nf4_nested" in line
    line = advise(found, 4.0, num_nodes=2)
    assert line is not None and "--optimizer" not in line
    line = advise(found, 4.0, peft="state", peft_config={})
    assert line is not None and "--optimizer" not in line
    # nor has every host the room: moments in 8 bits and the bits that bf16 lacks are 4 bytes
    for free in (8 * NUM_TRAINED, 8 * NUM_TRAINED - 1):
        monkeypatch.setattr(memory, "free_host_memory", lambda free=free: free)
        line = advise(found, 4.0)
        assert line is not None and ("--optimizer_cpu 1" in line) == (free == 8 * NUM_TRAINED)
    # nothing is left to change
    smallest = {"grad_cp": 2, "emb_cpu": 1, "optimizer_cpu": 1, "quant": "nf4_nested"}
    line = advise(found, 2.0, **smallest, quant_head=1)
    assert line == "memory: 2.0 GiB are free, and the run may not fit"
    # and nobody can say
    assert advise_memory(settings, replace(facts, memory=None), "cuda", 1, 1) is None


def test_rows_of_a_micro_batch_become_micro_batches(found: tuple[Settings, Facts]) -> None:
    settings, facts = found
    tiny = replace(facts, memory=1000)
    line = advise_memory(settings, tiny, "cuda", facts.num_weights, 1000)
    assert line is not None and "--micro_bsz 1 --accumulate_grad_batches 4 " in line


def test_what_leaves_the_device_is_chosen_where_nothing_less_fits(
    found: tuple[Settings, Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, facts = found
    ranks = {"w": 128, "a": 128, "v": 96, "g": 480}
    facts = replace(facts, num_weights=NUM_WEIGHTS)
    facts = replace(facts, model_config=replace(facts.model_config, **SHAPE, ranks=ranks))

    named = ("grad_cp", "emb_cpu", "optimizer_cpu")

    def chosen(gib: float, device: str = "cuda", **said: Any) -> tuple[Any, ...]:
        config = TrainConfig(
            load_model=settings.load_model, data_file=settings.data_file, precision="bf16",
            ctx_len=1024, micro_bsz=1, compile=0, cuda_graph=0, **said,
        )  # fmt: skip
        here = replace(facts, memory=int(gib * 2**30), device=torch.device(device))
        plan = choose(config, here)
        assert set(named) - said.keys() <= {x.name for x in plan.choices}
        return tuple(getattr(plan.settings, name) for name in named)

    found_values = [chosen(quarters / 4) for quarters in range(200, 60, -1)]
    # each in turn, from much memory to little
    ladder = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 1, 1)]
    assert list(dict.fromkeys(found_values)) == ladder
    least = {x: 50 - i / 4 for i, x in enumerate(found_values)}
    # an embedding of 512 MiB, of memory of which a fifth is left free
    assert least[1, 0, 0] - least[1, 1, 0] == pytest.approx(0.5 / 0.8, abs=0.25)
    # a step takes longer by what the optimizer has on the host: not for that fifth
    smallest = (NUM_WEIGHTS + NUM_WEIGHTS // 20 * 7 - 65536 * 4096) * 2 / 2**30
    assert smallest < least[2, 1, 0] < smallest + 1
    assert chosen(16, grad_cp=1) == (1, 1, 1) and chosen(16, emb_cpu=0) == (2, 0, 1)
    assert chosen(16, optimizer_cpu=0) == (2, 1, 0)
    assert chosen(80, grad_cp=2) == (2, 0, 0) and chosen(80, optimizer_cpu=1) == (0, 0, 1)
    # states have next to nothing there, and several devices were not measured
    assert chosen(12, peft="state") == chosen(12, devices=2, strategy="ddp") == (2, 1, 0)
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1 << 30)
    assert chosen(16) == (2, 1, 0)
    # a CPU has no other memory
    assert chosen(16, "cpu") == (1, 0, 0)
    with pytest.raises(ConfigError, match=r"--grad_cp 2 has inputs .* and this is cpu: give 1"):
        chosen(80, "cpu", grad_cp=2)
