"""A part of a tensor, as `fully_shard` cuts it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rwkv_peft.parallel.fsdp import _integers_without_gradients
from rwkv_peft.parallel.shard import Shard


class Parameter:
    """Stands for a DTensor that one of several ranks has a part of."""

    def __init__(self, rank: int, size: int, dim: int) -> None:
        self.placements = [SimpleNamespace(dim=dim)]
        self.device_mesh = SimpleNamespace(size=lambda: size, get_local_rank=lambda: rank)
        self.grad: Any = None

    def detach(self) -> "Parameter":
        return self

    def to_local(self) -> torch.Tensor:
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("rows", "dim", "size", "wanted"),
    [(6, 0, 3, [2, 2, 2]), (5, 0, 3, [2, 2, 1]), (4, 0, 3, [2, 2, 0]), (1, 1, 2, [4, 4])],
)
def test_ranks_have_the_parts_that_fully_shard_gives_them(
    rows: int, dim: int, size: int, wanted: list[int]
) -> None:
    whole = torch.arange(rows * 8.0).view(rows, 8)
    parts = [Shard(Parameter(rank, size, dim)).cut(whole) for rank in range(size)]
    assert [x.shape[dim] for x in parts] == wanted
    assert torch.equal(torch.cat(parts, dim), whole)


def test_a_gradient_is_moved_to_the_part_that_is_stepped() -> None:
    parameter = Parameter(0, 2, 0)
    shard, gradient = Shard(parameter), torch.ones(2)
    parameter.grad = SimpleNamespace(to_local=lambda: gradient)
    shard.take_gradient()
    assert shard.own.grad is gradient and parameter.grad is None


def test_a_part_of_whole_numbers_becomes_a_frozen_parameter() -> None:
    class Part(torch.Tensor):
        """Stands for a DTensor, as which PyTorch makes a part of a parameter."""

    part = torch.ones(4, dtype=torch.uint8).as_subclass(Part)
    with _integers_without_gradients():
        assert not nn.Parameter(part).requires_grad
        assert nn.Parameter(torch.ones(4)).requires_grad
        assert not nn.Parameter(torch.ones(4), requires_grad=False).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(part)
