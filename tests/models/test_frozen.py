"""A projection may store its weight in any form: here as int8 with a scale for each row."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rwkv_peft
from rwkv_peft.checkpoint.mapped import upcast_on_use
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.methods.merge import Addition, MergedWeights
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.frozen import FrozenLinear

TOKENS = torch.arange(1, 49).view(2, 24)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12},
    "miss": {"r": 24},
    "ia3": {},  # has no fast form: peft's own forward and merge
}
FUSED = ("lora", "miss")


class Int8Linear(FrozenLinear):
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(0))
        self.store(weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense())

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        return y.addmm_(x, self.dense().t())

    def add_transposed(self, dx: Tensor, dy: Tensor) -> Tensor:
        return dx.addmm_(dy, self.dense())

    def dense(
        self, dtype: torch.dtype | None = None, rows: slice = slice(None), *, copy: bool = False
    ) -> Tensor:
        return (self.weight.detach()[rows] * self.scale[rows]).to(dtype or self.compute_dtype)

    def store(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight.data = (weight / self.scale).round().to(torch.int8)


def projections(model: nn.Module) -> dict[str, FrozenLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}


def load(path: Path, *, is_quantised: bool) -> RWKV:
    """A model with int8 projections, or the one with the dense weights that these stand for."""
    model = rwkv_peft.load_model(path)
    for name, layer in projections(model).items():
        quantised = Int8Linear(layer.dense())
        assert quantised.num_bytes == layer.num_bytes // 4 + 4 * layer.out_features
        if is_quantised:
            model.set_submodule(name, quantised)
        else:
            layer.store(quantised.dense())
    return model


def attached(model: RWKV, method: str, *, is_fused: bool) -> Attachment:
    torch.manual_seed(0)
    trained = attach(model, method, METHODS[method], is_fused=is_fused)
    generator = torch.Generator().manual_seed(1)
    for p in trained.values():
        p.data += torch.randn(p.shape, generator=generator) / 20
    return trained


def answer(model: RWKV) -> Tensor:
    logits: Tensor = model.head(model.hidden(TOKENS)[0])
    return logits


@pytest.mark.parametrize("method", METHODS)
def test_training_on_a_quantised_base_is_training_on_its_dense_weights(
    method: str, model_file: Path
) -> None:
    found = []
    for is_quantised in (True, False):
        model = load(model_file, is_quantised=is_quantised)
        trained = attached(model, method, is_fused=True)
        is_fused = any(type(m).__name__.startswith("Fast") for m in model.modules())
        assert is_fused == (method in FUSED)
        logits = answer(model)
        logits.square().sum().backward()
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        assert len(gradients) == len(trained) and all(g.abs().max() > 0 for g in gradients)
        found.append([logits.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_merging_into_a_quantised_base_is_merging_into_its_dense_weights(
    method: str, model_file: Path
) -> None:
    weights = dict(load(model_file, is_quantised=False).named_parameters())
    merged, answers = [], []
    for is_quantised in (True, False):
        model = load(model_file, is_quantised=is_quantised)
        stored = {n: m.weight.clone() for n, m in projections(model).items()}
        trained = attached(model, method, is_fused=False)
        tensors = MergedWeights(weights, [Addition(model, trained)])
        merged.append({name: torch.cat(list(tensors.pieces(name))) for name in tensors.names})
        for name, layer in projections(model).items():
            assert torch.equal(layer.weight, stored[name.replace(".base_layer", "")])
        with torch.inference_mode():
            answers.append(
                [answer(model), *([answer(upcast_on_use(model))] if method in FUSED else [])]
            )
    assert merged[0].keys() == merged[1].keys() and merged[0]
    for name, value in merged[0].items():
        assert value.dtype == torch.float32 and not torch.equal(value, weights[name])
        assert torch.equal(value, merged[1][name]), name
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, answers[0][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", FUSED)
def test_backward_keeps_no_dense_copy_of_a_quantised_weight(method: str, model_file: Path) -> None:
    model = load(model_file, is_quantised=True)
    attached(model, method, is_fused=True)
    layer = model.blocks[1].ffn.key  # type: ignore[union-attr]
    kept: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(5, layer.in_features, requires_grad=True))
    assert kept and (layer.out_features, layer.in_features) not in kept


def test_taking_a_residual_out_of_a_quantised_base_rounds_it_to_its_own_form(
    model_file: Path,
) -> None:
    model = load(model_file, is_quantised=True)
    before = {name: layer.dense() for name, layer in projections(model).items()}
    trained = attach(model, "pissa", {"r": 4})
    assert trained.start
    for name, layer in projections(model).items():
        if name == "head":
            continue
        outer = name.removesuffix(".base_layer")
        assert layer.weight.dtype == torch.int8
        a, b = (trained.start[f"{outer}.lora_{x}.default.weight"] for x in "AB")
        rest = before[outer] - b @ a
        step = rest.abs().amax(1, keepdim=True) / 127
        assert ((layer.dense() - rest).abs() <= 0.51 * step).all()
