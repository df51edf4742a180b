"""A version is one record of the table, and nothing else has to be told of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rwkv_peft
from rwkv_peft import models
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models import rwkv6
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.models.layers import Block, PackingInfo
from rwkv_peft.models.time_state import TIME_STATE, StateFormat
from rwkv_peft.models.version import Version
from rwkv_peft.ops.wkv6 import Kernel
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.optim import Optimizer

TOKENS = torch.arange(1, 25).view(1, 24)


class ScaledChannelMix(rwkv6.ChannelMix):
    """RWKV-6's, let through by one more projection."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__(model_config)
        self.scale = FrozenLinear(model_config.n_embd, model_config.n_embd)
        self.spare = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, shift: Tensor | None, packing: PackingInfo) -> Tensor:
        scale: Tensor = self.scale(x)
        return super().forward(x, shift, packing) * torch.sigmoid(scale)


def toy_block(model_config: ModelConfig, layer: int, kernel: Kernel) -> Block:
    att = rwkv6.TimeMix(model_config, kernel)
    return Block(model_config, layer, att, ScaledChannelMix(model_config))


TOY = replace(
    rwkv6.VERSION,
    name="x999",
    detect=lambda shapes: "blocks.0.ffn.scale.weight" in shapes,
    block=toy_block,
    target_modules=("key", "scale"),
    unread=frozenset({"blocks.0.ffn.spare", "blocks.1.ffn.spare"}),
    parts={"gates": r"ffn\.receptance\.weight$"},
    lr_factors={"ffn.receptance.weight": 5.0},
    state=StateFormat(lambda config, is_full: TIME_STATE.shapes(config, True), TIME_STATE.to_state),
)


@pytest.fixture
def toy_file(
    make_model_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A file of a fourth version, which stands in the table alone."""
    changes = {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448}
    weights = read_weights(make_model_file(**changes))
    generator = torch.Generator().manual_seed(1)
    for i in range(2):
        weights[f"blocks.{i}.ffn.scale.weight"] = torch.randn(128, 128, generator=generator) / 11
        weights[f"blocks.{i}.ffn.spare"] = torch.ones(1)
    write_weights(tmp_path / "toy.pth", weights)
    monkeypatch.setattr(models, "VERSIONS", (TOY, *models.VERSIONS))
    return tmp_path / "toy.pth"


def test_a_fourth_version_needs_a_row_of_the_table_and_nothing_else(toy_file: Path) -> None:
    model = rwkv_peft.load_model(toy_file)
    assert (model.version, model.model_config.version) == (TOY, "x999")
    assert model.model_config.ranks == {"maa": 16, "decay": 32}

    trained = attach(model, "lora", {"r": 4}, train_parts=["gates"])
    assert set(trained.plain) == {f"blocks.{i}.ffn.receptance.weight" for i in range(2)}
    adapted = {name.partition(".lora_")[0] for name in trained if ".lora_" in name}
    modules = ("att.key", "ffn.key", "ffn.scale")
    assert adapted == {f"blocks.{i}.{module}" for i in range(2) for module in modules}
    model(TOKENS)[0].square().sum().backward()
    assert all(p.grad is not None for p in trained.values())

    everything = attach(rwkv_peft.load_model(toy_file), "none", {})
    assert not any("spare" in name for name in everything)
    assert "blocks.0.ffn.scale.weight" in everything

    states = LearnedStates(rwkv_peft.load_model(toy_file))
    assert {name: tuple(x.shape) for name, x in states.items() if ".0." in name} == {
        "blocks.0.att.time_state": (2, 64, 64),
        "blocks.0.att.ts_state": (128,),
        "blocks.0.ffn.ts_state": (128,),
    }


def test_its_learning_rate_factors_are_heeded(toy_file: Path) -> None:
    model = rwkv_peft.load_model(toy_file)
    trained = attach(model, "none", {}, train_parts=["ffn.receptance", "ffn.key"])
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = Optimizer(
        trained,
        Grouping(plain=trained.plain, raises_rates=True),
        betas=(0.9, 0.99),
        eps=0.0,
        grad_clip=0.0,
    )
    optimizer.backward(torch.stack([p.sum() for p in trained.values()]).sum())
    optimizer.step(1e-3)
    for name, p in trained.items():
        rate = 5e-3 if "receptance" in name else 1e-3
        torch.testing.assert_close(before[name] - p, torch.full_like(p, rate), rtol=1e-3, atol=0)


def test_errors_list_the_versions_of_the_table(toy_file: Path, tmp_path: Path) -> None:
    names = "x999, x070, x060, x052, x051, x050"
    torch.save({name: torch.zeros(9, 8) for name in ("emb.weight", "head.weight")}, tmp_path / "v4")
    with pytest.raises(CheckpointError, match=f"only {names} can be used"):
        rwkv_peft.load_model(tmp_path / "v4")
    with pytest.raises(ConfigError, match=f"RWKV x123 is not known: there are {names}"):
        models.version_named("x123")


@pytest.mark.parametrize("version", models.VERSIONS, ids=lambda v: v.name)
def test_what_a_record_names_is_in_the_model(
    version: Version, make_model_file: Callable[..., Path]
) -> None:
    ranks = {"x070": {"w": 32, "a": 32, "v": 32, "g": 32}, "x060": {"maa": 16, "decay": 32}}
    changes = {"has_time_first": True, "has_first_value_mix": True}
    model = rwkv_peft.load_model(
        make_model_file(version=version.name, ranks=ranks.get(version.name, {}), **changes)
    )
    names = set(dict(model.named_parameters()))
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert model.version is version
    assert set(version.target_modules) <= modules
    assert version.unread <= names
    assert all(any(name.endswith(end) for name in names) for end in version.lr_factors)
