"""Every method on a base in 8 or 4 bits: trained, saved, loaded and merged, or refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.adapter import attach_saved
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.checkpoint.stored import BaseAsTrained
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods import residual
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.stored import REFUSED
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import Storage, stored_layers
from rwkv_peft.training.run import train
from tests.methods.test_catalog import CASES as CATALOG
from tests.methods.test_catalog import NOT_NEUTRAL, moved
from tests.quant.test_linear import DENSE

TOKENS = torch.arange(1, 49).view(2, 24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **CATALOG,
    "none": ("none", {}),
    "dora": ("lora", {"r": 4, "use_dora": True}),
    "dora with dropout": ("lora", {"r": 4, "use_dora": True, "lora_dropout": 0.1}),
    "lora on the head": ("lora", {"r": 4, "target_modules": ["head", "att.key"]}),
    "olora": ("lora", {"r": 4, "init_lora_weights": "olora"}),
    "pissa by SVD": ("lora", {"r": 4, "init_lora_weights": "pissa", "use_rslora": True}),
    "pissa of ranks": ("pissa", {"r": 4, "rank_pattern": {"att.key": 2}, "alpha_pattern":
                                 {"ffn.value": 16}}),
    "rslora": ("lora", {"r": 4, "use_rslora": True}),
}  # fmt: skip
OPTIONS_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"kasa_config": {}}),
    ("lora", {"target_parameters": ["att.key.weight"]}),
    ("lora", {"modules_to_save": ["ffn"]}),
]


# one of each kind: fused, reading the weight, beginning with a part of it, having its own schedule
USUAL = ("lora", "miss", "dora", "oft", "pissa by SVD", "adalora", *REFUSED)


@pytest.fixture
def config(model_file: Path, data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(model_file), data_file=str(data_file), proj_dir=str(tmp_path / "run"),
        quant="nf4", dataload="pad", epoch_count=1, micro_bsz=6, ctx_len=48, lr_init=1e-2,
        precision="fp32", accelerator="cpu", random_seed=0, data_cache=str(tmp_path / "cache"),
    )  # fmt: skip


def stored_model(path: Path, quant: str, dtype: torch.dtype = torch.float32) -> RWKV:
    weights = read_weights(path)
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights, dtype=dtype, storage=Storage(quant, dtype))
    return model


def logits(model: RWKV) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(TOKENS)[0]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "quant",
    ["nf4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "fp4", "nf4_nested"))],
)
@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.slow] * (x not in USUAL)) for x in CASES]
)
def test_a_method_trains_saves_loads_and_merges_or_is_refused_by_name(
    case: str, quant: str, config: TrainConfig, make_model_file: Any, tmp_path: Path
) -> None:
    method, options = CASES[case]
    base = make_model_file("exact.pth", dtype=torch.float32)
    run = replace(config, load_model=str(base), peft=method, peft_config=options, quant=quant)
    if method in REFUSED:
        with pytest.raises(ConfigError, match=f"--quant cannot serve --peft {method}, ") as caught:
            train(run)
        assert "\n" not in str(caught.value)
        return
    assert train(run).steps == 3
    adapter, merged = tmp_path / "run/rwkv-0-adapter", tmp_path / "run/rwkv-0.pth"
    weights, again = read_weights(base), stored_model(base, quant)
    attachment, values = attach_saved(again, adapter, weights=weights)
    for name, value in values.items():
        attachment[name].data.copy_(value)
    wanted = logits(again)
    # tokens that the data lacks learn nothing
    is_moved = case != "trainable_tokens"
    assert torch.equal(wanted, logits(stored_model(base, quant))) != is_moved
    for model in (
        rwkv_peft.load_model(merged),
        rwkv_peft.load_model(base, adapter=adapter),
    ):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [x for x in CASES if CASES[x][0] not in REFUSED])
def test_a_method_begins_with_the_base_and_leaves_what_is_stored(
    case: str, make_model_file: Any
) -> None:
    method, options = CASES[case]
    base = make_model_file(dtype=torch.float32)
    model = stored_model(base, "nf4")
    before, layers = logits(model), dict(stored_layers(model))
    held = {name: layer.weight.clone() for name, layer in layers.items()}
    trained = attach(model, method, options, weights=read_weights(base))
    assert type(model) is RWKV and {type(x).__name__ for x in layers.values()} == {"NF4Linear"}
    is_residual = bool(trained.start)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, held[name]) != (is_residual and layer_is_in(trained, name))
    if is_residual:
        for path, lora in residual.layers(model):
            a, b = (trained.start[f"{path}.lora_{x}.default.weight"].double() for x in "AB")
            rest = read_weights(base)[f"{path}.weight"] - lora.scaling["default"] * (b @ a)
            packed, _ = quantize_4bit(rest.float(), blocksize=64, quant_type="nf4")
            assert torch.equal(layers[path].weight, packed)
    elif method not in NOT_NEUTRAL:
        assert (logits(model) - before).abs().max() < 1e-4
    moved(trained)
    model.train()(TOKENS)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


def layer_is_in(trained: Any, name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in trained.start)


@pytest.mark.parametrize(("method", "options"), OPTIONS_REFUSED)
def test_an_option_that_needs_dense_weights_is_refused_by_name(
    method: str, options: dict[str, Any], config: TrainConfig, tmp_path: Path
) -> None:
    run = replace(config, peft=method, peft_config=options)
    with pytest.raises(ConfigError, match=f"--quant cannot serve {next(iter(options))}"):
        train(run)
    assert not (tmp_path / "run" / "rwkv-0.pth").exists()


@pytest.mark.parametrize("rate", [0, 0.3])
@pytest.mark.parametrize("method", ["lora", "miss"])
@pytest.mark.parametrize("quant", DENSE)
def test_fused_layers_have_the_bits_of_dense_ones_and_pefts_numbers(
    quant: str, method: str, rate: float, make_model_file: Any
) -> None:
    options = {"lora": {"r": 4, "lora_dropout": rate}, "miss": {"r": 8, "miss_dropout": rate}}
    weights = read_weights(make_model_file(dtype=torch.float32))
    storage, found = Storage(quant, torch.float64), {}
    for way in ("stored", "dense", "peft"):
        model = build(infer_model_config(weights), op="torch")
        if way == "stored":
            load_weights(model, weights, dtype=torch.float64, storage=storage)
        else:
            load_weights(model, BaseAsTrained(weights, storage), dtype=torch.float64)
        torch.manual_seed(1)
        trained = attach(model, method, options[method], is_fused=way != "peft")
        assert any(type(x).__name__.startswith("Fast") for x in model.modules()) == (way != "peft")
        moved(trained)
        torch.manual_seed(2)
        y = model.train()(TOKENS)[0]
        y.square().sum().backward()
        found[way] = [y, *(p.grad for p in trained.values())]
    for one, other in zip(found["stored"], found["dense"], strict=True):
        assert one is not None and torch.equal(one, other)
    if rate:
        # peft draws what it drops otherwise
        return
    for one, other in zip(found["stored"], found["peft"], strict=True):
        # sums of a few hundred float64 products in another order, through two blocks
        torch.testing.assert_close(
            one, other, rtol=1e-9, atol=1e-9 * other.detach().abs().max().item()
        )
