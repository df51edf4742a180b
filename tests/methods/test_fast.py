"""The fused layers against peft's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rwkv_peft
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.fast import _shards, fuse
from rwkv_peft.models.frozen import FrozenLinear

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4, "lora_alpha": 12}),
    "rslora": ("lora", {"r": 4, "use_rslora": True}),
    "pissa": ("pissa", {"r": 4}),
    "lora with dropout": ("lora", {"r": 4, "lora_dropout": 0.3}),
    "miss": ("miss", {"r": 8}),
    "miss whose rank divides nothing": ("miss", {"r": 24}),
    "miss mini": ("miss", {"r": 8, "mini_r": 32, "init_weights": "mini"}),
    "miss with dropout": ("miss", {"r": 16, "miss_dropout": 0.3}),
}


class Projection(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(96, 64, generator=generator, dtype=torch.float64) / 8
        self.key = FrozenLinear(64, 96)
        self.key.weight = nn.Parameter(weight.to(dtype), requires_grad=False)


def adapted(name: str, dtype: torch.dtype, *, is_fused: bool) -> nn.Module:
    from rwkv_peft.methods.attach import inject
    from rwkv_peft.methods.catalog import method_config

    method, options = METHODS[name]
    options = {**options, "target_modules": ["key"]}
    options.pop("init_lora_weights", None)
    model = Projection(dtype)
    config = method_config(method, options, "x070")
    if method == "pissa":
        config.init_lora_weights = True  # type: ignore[attr-defined]
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data = (noise / 4).to(dtype)
    assert fuse(model) == 1 if is_fused else True
    return model.train()


def results(name: str, dtype: torch.dtype, *, is_fused: bool) -> list[Tensor]:
    """Output, gradient of the input and of what is trained."""
    model = adapted(name, dtype, is_fused=is_fused)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 50, 64, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(3, 50, 96, generator=generator, dtype=torch.float64).to(dtype)
    x.requires_grad_()
    torch.manual_seed(3)
    y = model.key(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.fixture
def same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both draw their masks in the one way, as PyTorch's two ways draw other numbers."""

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]

    monkeypatch.setattr(nn.Dropout, "forward", forward)


@pytest.mark.usefixtures("same_dropout")
@pytest.mark.parametrize("name", METHODS)
def test_the_fused_layer_equals_pefts_own_in_float64(name: str) -> None:
    ours = results(name, torch.float64, is_fused=True)
    theirs = results(name, torch.float64, is_fused=False)
    assert len(ours) == len(theirs) >= 3
    for one, other in zip(ours, theirs, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("same_dropout")
@pytest.mark.parametrize("name", METHODS)
def test_the_fused_layer_in_bf16_is_within_the_error_budget(name: str) -> None:
    exact = results(name, torch.float64, is_fused=False)
    plain = results(name, torch.bfloat16, is_fused=False)
    ours = results(name, torch.bfloat16, is_fused=True)
    eps = torch.finfo(torch.bfloat16).eps
    # the weights of the exact run are not rounded to bf16: the plain run has that error too
    for e, p, o in zip(exact, plain, ours, strict=True):
        budget = 2 * (p.double() - e).abs().max() + eps * e.abs().max()
        assert (o.double() - e).abs().max() <= budget


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_the_fused_layer_equal_finite_differences(name: str) -> None:
    model = adapted(name, torch.float64, is_fused=True).eval()
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return model.key(x)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *trained), fast_mode=True)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    for name in ("lora", "miss"):
        model = adapted(name, torch.float64, is_fused=True)
        x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(model.key(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("name", ["lora", "miss"])
def test_what_changes_after_fusing_is_heeded(name: str) -> None:
    fused, plain = (adapted(name, torch.float64, is_fused=f) for f in (True, False))
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = x @ fused.key.base_layer.weight.T

    def assert_same() -> Tensor:
        ours: Tensor = fused.key(x)
        torch.testing.assert_close(ours, plain.key(x), rtol=1e-12, atol=1e-12)
        return ours

    changed = assert_same()
    for model in (fused, plain):  # other tensors, not other values in the same
        generator = torch.Generator().manual_seed(5)
        values = {
            k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()
        }
        model.load_state_dict({k: v.double() for k, v in values.items()}, assign=True)
        model.requires_grad_(False)
    assert not torch.equal(assert_same(), changed)
    for model in (fused, plain):
        model.float()
    torch.testing.assert_close(fused.key(x.float()), plain.key(x.float()))
    for model in (fused, plain):
        model.double()
        model.key.set_scale("default", 3.0) if name == "lora" else None
    base = x @ fused.key.base_layer.weight.T
    changed = assert_same()
    for model in (fused, plain):
        model.key.enable_adapters(False)
    assert torch.equal(assert_same(), base)
    for model in (fused, plain):
        model.key.enable_adapters(True)
        model.key.merge()
    torch.testing.assert_close(assert_same(), changed)
    for model in (fused, plain):
        model.key.unmerge()
        model.key.set_adapter([])
    torch.testing.assert_close(assert_same(), base, rtol=0, atol=1e-12)
    for model in (fused, plain):
        model.key.delete_adapter("default")
    assert_same()


def test_dropout_drops_the_adapters_input_alone_and_keeps_its_mean() -> None:
    model = adapted("lora with dropout", torch.float64, is_fused=True)
    x = torch.ones(4000, 64, dtype=torch.float64)
    base = x[0] @ model.key.base_layer.weight.T
    torch.manual_seed(0)
    change = model.key(x) - base
    expected = model.eval().key(x)[0] - base
    # 0.3 dropped of 64 inputs, 4000 times: the mean is off by a percent of the spread
    assert (change.mean(0) - expected).abs().max() < 0.1 * change.std(0).max()
    assert change.std(0).min() > 0


@pytest.mark.parametrize("method", ["lora", "miss"])
def test_fused_and_plain_models_have_the_same_gradients(
    method: str, make_model_file: Callable[..., Path]
) -> None:
    path = make_model_file()
    tokens = torch.arange(1, 25).view(1, 24)
    gradients = []
    for is_fused in (True, False):
        model = rwkv_peft.load_model(path, dtype="float64")
        torch.manual_seed(0)
        trained = attach(model, method, {"r": 8}, is_fused=is_fused)
        generator = torch.Generator().manual_seed(1)
        for p in trained.values():
            p.data += torch.randn(p.shape, generator=generator, dtype=torch.float64) / 20
        model(tokens)[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in trained.items()})
        kinds = {type(m).__name__ for m in model.modules()}
        assert any(k.startswith("Fast") for k in kinds) == is_fused
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {"use_dora": True}), ("miss", {"init_weights": "bat", "r": 32}), ("ia3", {})],
)
def test_what_no_fast_form_serves_is_left_to_peft(
    method: str, options: dict[str, Any], model_file: Path
) -> None:
    model = rwkv_peft.load_model(model_file)
    attach(model, method, options)
    assert fuse(model) == 0
    assert not any(type(m).__name__.startswith("Fast") for m in model.modules())


@pytest.mark.parametrize(("name", "expected"), [("lora", {64, 4}), ("miss", {8})])
def test_nothing_but_what_a_gradient_needs_is_kept_for_backward(
    name: str, expected: set[int]
) -> None:
    model = adapted(name, torch.float32, is_fused=True)
    x = torch.randn(50, 64, requires_grad=True)

    def widths() -> set[int]:
        kept: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.key(x)
        return {t.shape[1] for t in kept if len(t) == len(x)}

    # MiSS needs no input, nor does LoRA whose first matrix is not trained
    assert widths() == expected
    if name == "lora":
        model.key.lora_A.requires_grad_(False)
        assert widths() == {4}


def test_the_fixed_matrix_of_miss_is_shared_and_in_no_state() -> None:
    x = torch.randn(50, 64)
    fixed: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.shape == (8, 64):
            assert not t.requires_grad
            fixed.append(t.data_ptr())
        return t

    def names(model: nn.Module) -> list[str]:
        parameters, buffers = model.named_parameters(), model.named_buffers()
        return [*model.state_dict(), *dict(parameters), *dict(buffers)]

    models = [adapted("miss", torch.float32, is_fused=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for model in models:
            model.key(x)
    assert len(fixed) == 2 and len(set(fixed)) == 1
    plain = adapted("miss", torch.float32, is_fused=False)
    assert [names(model) for model in models] == [names(plain)] * 2


def test_a_layer_that_answered_first_is_trained_all_the_same() -> None:
    _shards.cache_clear()
    model = adapted("miss", torch.float64, is_fused=True)
    x = torch.randn(5, 64, dtype=torch.float64)
    with torch.inference_mode():
        answer = model.key(x)
    trained = model.key(x)
    trained.sum().backward()
    assert torch.equal(trained, answer)
    assert model.key.miss_block["default"].grad.abs().min() > 0
