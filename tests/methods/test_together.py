"""Adapted layers whose narrow products are one batch, against peft's own layers one by one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import rwkv_peft
from rwkv_peft.methods import fast
from rwkv_peft.methods.attach import attach
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.models.project import project
from tests.methods.test_fast import METHODS, adapted
from tests.models.test_versions import VERSIONS

NAMES = [name for name in METHODS if "dropout" not in name]
# forward x A^T and u B^T, backward dy B, g A, and the gradients of A (of LoRA) and of B
BATCHES = {"lora": 6, "rslora": 6, "pissa": 6}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def three(name: str, *, is_fused: bool, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Layers with weights and adapters of their own."""
    layers: list[Any] = [adapted(name, dtype, is_fused=is_fused).key for _ in range(3)]
    generator = torch.Generator().manual_seed(4)
    for layer in layers:
        for _, p in sorted(layer.named_parameters()):
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data = (drawn / 4).to(dtype)
    return layers


def results(layers: list[Any], call: Callable[..., Any]) -> list[Tensor]:
    """Outputs, gradients of inputs and of what is trained, by what is called with the inputs."""
    generator = torch.Generator().manual_seed(2)
    dtype = layers[0].base_layer.weight.dtype

    def drawn(width: int) -> list[Tensor]:
        shape = 2, 25, width
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in layers]
        return [x.to(dtype) for x in made]

    xs, dys = [x.requires_grad_() for x in drawn(64)], drawn(96)
    trained = [
        p for layer in layers for _, p in sorted(layer.named_parameters()) if p.requires_grad
    ]
    ys = call(xs)
    return [*ys, *torch.autograd.grad(ys, [*xs, *trained], dys)]


def counting() -> tuple[Callable[..., Any], list[int]]:
    """A compiler's backend, and the batched products of each graph that it is given."""
    counts: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        products = torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default
        counts.append(sum(node.target in products for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count, bw_compiler=count), counts


def compiled(layers: list[Any]) -> tuple[Callable[..., Any], list[int]]:
    """`project` through a compiler, and the batched products of each of its graphs."""
    backend, counts = counting()
    owner = nn.ModuleList(layers)
    call = torch.compile(lambda xs: list(project(list(owner), xs)), backend=backend, fullgraph=True)
    return call, counts


def one_by_one(layers: list[Any]) -> Callable[..., Any]:
    return lambda xs: [layer(x) for layer, x in zip(layers, xs, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_layers_together_equal_pefts_own_in_float64(name: str) -> None:
    layers, theirs = three(name, is_fused=True), three(name, is_fused=False)
    call, counts = compiled(layers)
    found, expected = results(layers, call), results(theirs, one_by_one(theirs))
    assert sum(counts) == BATCHES.get(name, 5)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_layers_together_in_bf16_are_within_the_error_budget(name: str) -> None:
    def run(dtype: torch.dtype, *, is_fused: bool) -> list[Tensor]:
        layers = three(name, is_fused=is_fused, dtype=dtype)
        return results(layers, compiled(layers)[0] if is_fused else one_by_one(layers))

    exact = run(torch.float64, is_fused=False)
    plain, ours = (run(torch.bfloat16, is_fused=is_fused) for is_fused in (False, True))
    eps = torch.finfo(torch.bfloat16).eps
    for e, p, o in zip(exact, plain, ours, strict=True):
        budget = 2 * (p.double() - e).abs().max() + eps * e.abs().max()
        assert (o.double() - e).abs().max() <= budget


def other_scale(layers: list[Any]) -> None:
    layers[1].scaling["default"] = 0.5


def other_rank(layers: list[Any]) -> None:
    layers[2].lora_A["default"].weight = nn.Parameter(torch.randn(2, 64, dtype=torch.float64))
    layers[2].lora_B["default"].weight = nn.Parameter(torch.randn(96, 2, dtype=torch.float64))


def switched_off(layers: list[Any]) -> None:
    layers[0].enable_adapters(False)


def merged(layers: list[Any]) -> None:
    layers[1].merge()


def dropping(layers: list[Any]) -> None:
    # a rate is what counts, and of one that drops nothing the results are known
    layers[2].lora_dropout["default"] = nn.Dropout(1e-300)


@pytest.mark.parametrize("change", [other_scale, other_rank, switched_off, merged, dropping])
def test_layers_that_differ_are_asked_one_by_one(change: Callable[[list[Any]], None]) -> None:
    layers = three("lora", is_fused=True)
    torch.manual_seed(0)
    change(layers)
    call, counts = compiled(layers)
    xs = [torch.randn(9, 64, dtype=torch.float64) for _ in layers]
    for one, other in zip(call(xs), one_by_one(layers)(xs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert counts and not any(counts)


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_compiled_block_asks_its_layers_together(
    version: str, make_model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokens = make_model_file(**VERSIONS[version]), torch.arange(1, 25).view(1, 24)

    def count() -> int:
        torch._dynamo.reset()
        model = rwkv_peft.load_model(path)
        attach(model, "lora", {"r": 4})
        backend, counts = counting()
        compile_blocks(model, backend=backend)  # type: ignore[arg-type]
        model(tokens)[0].sum().backward()
        return sum(counts)

    together = count()
    monkeypatch.setattr(fast, "_are_alike", lambda *_: False)
    # the first block has a code of its own, without a gradient of its input
    assert together == count() + 2 * BATCHES["lora"] - 1


def test_each_of_several_frozen_matrices_counts() -> None:
    layers, theirs = three("lora", is_fused=True), three("lora", is_fused=False)
    for layer in (*layers, *theirs):
        layer.lora_A.requires_grad_(False)
    call, counts = compiled(layers)
    found, expected = results(layers, call), results(theirs, one_by_one(theirs))
    assert sum(counts) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
