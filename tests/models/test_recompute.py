"""Blocks that are computed again in backward give the same bits as blocks that are kept."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.models.recompute import recompute


class Twice(torch.autograd.Function):
    """2 x y, which asks for what it kept more than once."""

    @staticmethod
    def forward(ctx, x, y):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, y)
        return 2 * x * y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, _ = ctx.saved_tensors
        _, y = ctx.saved_tensors
        return 2 * grad * y, 2 * grad * x


class Block(nn.Module):
    """Operations that keep inputs, outputs, parameters and random masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: Tensor, scale: float, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        inner = torch.dropout(self.first(x).sigmoid().exp(), 0.3, True)
        out = Twice.apply(self.second(inner), x) * scale
        carry = out if carry is None else carry + out.tanh()
        return out, carry


def loss_of(blocks: list[Block], x: Tensor, *, again: bool) -> Tensor:
    carry = None
    for block in blocks:
        args: tuple[Any, ...] = (x, 0.5, carry)
        x, carry = recompute(block, *args) if again else block(*args)
    assert carry is not None
    return (x + carry).square().sum()


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(3)]


def test_gradients_and_random_numbers_are_those_of_activations_kept(blocks: list[Block]) -> None:
    parameters = [p for block in blocks for p in block.parameters()]
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        x = torch.randn(4, 8, requires_grad=True)
        grads = torch.autograd.grad(loss_of(blocks, x, again=again), [x, *parameters])
        found.append([*grads, torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [block.calls for block in blocks] == [3, 3, 3]


def test_parameters_accumulate_and_frozen_inputs_are_served(blocks: list[Block]) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 8)
    for again in (False, True):
        torch.manual_seed(2)
        loss_of(blocks, x, again=again).backward()
    kept = [p.grad.clone() for block in blocks for p in block.parameters() if p.grad is not None]
    assert len(kept) == 12
    torch.manual_seed(2)
    for block in blocks:
        block.zero_grad()
    loss_of(blocks, x, again=False).backward()
    once = [p.grad for block in blocks for p in block.parameters() if p.grad is not None]
    assert all(torch.equal(a, 2 * b) for a, b in zip(kept, once, strict=True))


def test_a_graph_that_is_retained_can_be_gone_through_again(blocks: list[Block]) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    loss = loss_of(blocks, x, again=True)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_inside_outlives_forward_and_each_tensor_goes_when_it_was_used() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(grad: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        return grad

    def function(x: Tensor) -> tuple[Tensor, None]:
        for _ in range(4):
            x = x.exp()
            made.append(weakref.ref(x.untyped_storage()))
            if x.requires_grad:
                x.register_hook(count)
        return x * x, None

    x = torch.randn(8, requires_grad=True)
    y, _ = recompute(function, x)
    assert [ref() for ref in made] == [None] * 4
    y.sum().backward()
    assert len(made) == 8
    # of the second call's four the last is in use when backward begins, and none at the end
    assert alive == sorted(alive, reverse=True) and alive[0] >= 3 and alive[-1] <= 1
    assert all(ref() is None for ref in made)


def test_an_error_of_the_second_call_is_told_and_the_generators_go_on(blocks: list[Block]) -> None:
    def function(x: Tensor) -> Tensor:
        torch.rand(2)
        if calls:
            raise ValueError("the second call")
        calls.append(1)
        return x.exp().exp()

    calls: list[int] = []
    x = torch.randn(4, requires_grad=True)
    y = recompute(function, x)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="the second call"):
        y.sum().backward()
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
