"""What holds for every version, RWKV-5 and 6 among them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import geometry_of, read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.methods.attach import attach
from rwkv_peft.training.loop import train

SIXTH: dict[str, Any] = {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448}
VERSIONS: dict[str, dict[str, Any]] = {
    "7": {},
    "6": SIXTH,
    "6 with other ranks": {**SIXTH, "ranks": {"maa": 64, "decay": 128}, "n_layer": 3},
    "5.2": {"version": "x052", "ranks": {}, "dim_ffn": 448},
    "5.2 with time_first": {"version": "x052", "ranks": {}, "has_time_first": True},
    "5.1": {"version": "x051", "ranks": {}, "has_time_first": True, "dim_ffn": 448},
    "5.0": {"version": "x050", "ranks": {}, "has_time_first": True},
}


@pytest.mark.parametrize("name", VERSIONS)
@torch.inference_mode()
def test_logits_equal_those_of_the_official_runtime(
    name: str, make_model_file: Callable[..., Path], official_logits: Callable[..., torch.Tensor]
) -> None:
    version = VERSIONS[name].get("version", "x070")
    # for RWKV-5 and 6 the package folds ln0 into the embedding in the type of the file, which
    # rounds it if that is bf16
    dtype = torch.bfloat16 if version == "x070" else torch.float32
    path = make_model_file(dtype=dtype, **VERSIONS[name])
    model = rwkv_peft.load_model(path)
    assert model.geometry.version == version
    tokens = torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(1))
    official = official_logits(path, tokens[0].tolist(), version)
    assert official.abs().max() > 0.5
    whole = model(tokens)[0][0]
    torch.testing.assert_close(whole, official, rtol=0, atol=1e-4)
    for lengths in ([5, 33, 10], [1] * 48):
        state, logits = None, []
        for stretch in tokens.split(lengths, 1):
            part, state = model(stretch, state)
            logits.append(part)
        torch.testing.assert_close(torch.cat(logits, 1)[0], official, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VERSIONS)
def test_geometry_survives_the_file(name: str, make_model_file: Callable[..., Path]) -> None:
    changes = VERSIONS[name]
    geometry = geometry_of(read_weights(make_model_file(**changes)))
    for field, value in changes.items():
        assert getattr(geometry, field) == value
    assert (geometry.n_head, geometry.head_size) == (2, 64)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("method", ["lora", "none"])
def test_all_that_is_trained_receives_gradients_and_nothing_else(
    method: Any, name: str, make_model_file: Callable[..., Path]
) -> None:
    model = rwkv_peft.load_model(make_model_file(**VERSIONS[name]))
    trained = attach(model, method, {"init_lora_weights": False} if method == "lora" else {})
    tokens = torch.arange(1, 41).view(1, 40)
    model(tokens)[0].square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in trained), key
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", VERSIONS)
def test_a_tuned_and_merged_model_opens_in_the_official_runtime(
    name: str,
    make_model_file: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
    official_logits: Callable[..., torch.Tensor],
) -> None:
    base = make_model_file(dtype=torch.float32, **VERSIONS[name])
    result = train(
        TrainConfig(
            load_model=str(base),
            data_file=str(data_file),
            proj_dir=str(tmp_path / "out"),
            peft="lora",
            epoch_count=2,
            lr_init=1e-2,
            precision="fp32",
            accelerator="cpu",
            random_seed=0,
        )
    )
    assert result.weights is not None
    tokens = list(range(1, 40))
    with torch.inference_mode():
        adapted = rwkv_peft.load_model(base, adapter=result.adapter)(torch.tensor([tokens]))[0][0]
        plain = rwkv_peft.load_model(base)(torch.tensor([tokens]))[0][0]
    assert (adapted - plain).abs().max() > 1e-2
    official = official_logits(result.weights, tokens, VERSIONS[name].get("version", "x070"))
    torch.testing.assert_close(official, adapted, rtol=0, atol=1e-4)
