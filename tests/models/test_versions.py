"""What holds for every version, RWKV-5 and 6 among them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import infer_model_config, read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ShapeError
from rwkv_peft.methods.attach import attach
from rwkv_peft.ops.cases import make_segment_ids
from rwkv_peft.state import RWKVState
from rwkv_peft.training.run import train

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
    assert model.model_config.version == version
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
def test_the_model_config_survives_the_file(
    name: str, make_model_file: Callable[..., Path]
) -> None:
    changes = VERSIONS[name]
    model_config = infer_model_config(read_weights(make_model_file(**changes)))
    for field, value in changes.items():
        assert getattr(model_config, field) == value
    assert (model_config.n_head, model_config.head_size) == (2, 64)


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


def borders(ids: list[int]) -> list[tuple[int, int]]:
    """First token and end of each document of a row."""
    ends = [t for t in range(1, len(ids) + 1) if t == len(ids) or ids[t] != ids[t - 1]]
    return list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("name", VERSIONS)
def test_packed_documents_give_what_they_give_one_by_one(
    name: str, make_model_file: Callable[..., Path]
) -> None:
    model = rwkv_peft.load_model(make_model_file(**VERSIONS[name]), dtype="float64")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 320, (2, 80), generator=generator)
    wanted = torch.randn(2, 80, 320, dtype=torch.float64, generator=generator)
    segment_ids = make_segment_ids(2, 80)
    with torch.no_grad():
        _, state = model(torch.randint(0, 320, (2, 5), generator=generator))

    packed, end = model(tokens, state, segment_ids=segment_ids)
    found = torch.autograd.grad((packed * wanted).sum(), list(parameters.values()))
    summed = [torch.zeros_like(gradient) for gradient in found]
    num = 0
    for row in range(2):
        one = slice(row, row + 1)
        for begin, stop in borders(segment_ids[row].tolist()):
            num += 1
            given = state.select(torch.tensor([row])) if begin == 0 else None
            logits, last = model(tokens[one, begin:stop], given)
            torch.testing.assert_close(packed[one, begin:stop], logits, rtol=0, atol=1e-10)
            loss = (logits * wanted[one, begin:stop]).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(summed, gradients, strict=True):
                if gradient is not None:
                    total += gradient
            if stop == 80:
                assert_states_equal(end.select(torch.tensor([row])), last)
    assert num > 6
    for key, one_by_one, together in zip(parameters, summed, found, strict=True):
        assert (one_by_one - together).abs().max() < 1e-10 * together.abs().max(), key


def assert_states_equal(one: RWKVState, other: RWKVState) -> None:
    for field in ("att_shift", "ffn_shift", "wkv"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VERSIONS)
def test_recomputed_blocks_keep_to_the_documents(
    name: str, make_model_file: Callable[..., Path]
) -> None:
    model = rwkv_peft.load_model(make_model_file(**VERSIONS[name]), dtype="float64")
    trained = attach(model, "none", {})
    tokens = torch.randint(0, 320, (2, 70), generator=torch.Generator().manual_seed(1))
    gradients = []
    for grad_cp in (False, True):
        model.grad_cp = grad_cp
        logits, _ = model(tokens, segment_ids=make_segment_ids(2, 70))
        gradients.append(torch.autograd.grad(logits.square().sum(), list(trained.values())))
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_segments_of_another_shape_are_refused(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    with pytest.raises(ShapeError, match=r"segment_ids must be \(1, 8\) torch.int32 on cpu, got"):
        model(torch.ones(1, 8, dtype=torch.long), segment_ids=torch.zeros(8, dtype=torch.int32))
