import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rwkv_peft.loss
from rwkv_peft.loss import head_loss


def inputs(num_rows: int = 23) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=torch.float64)
    rows = torch.randn(num_rows, 16, dtype=torch.float64, requires_grad=True)
    return head, rows, torch.randint(0, 50, (num_rows,))


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-2])
def test_chunked_head_equals_the_loss_over_all_logits(
    chunk: int, l2wrap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, rows, targets = inputs()
    logits = head(rows)
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    objective = cross_entropy + 0.5 * l2wrap * logits.max(-1).values.pow(2).sum()
    expected = torch.autograd.grad(objective / 7, [rows, head.weight])
    monkeypatch.setattr(rwkv_peft.loss, "MAX_LOGITS", chunk * 50)
    sums = head_loss(head, rows, targets, l2wrap=l2wrap)
    torch.testing.assert_close(sums.objective, objective)
    torch.testing.assert_close(sums.cross_entropy, cross_entropy)
    assert not sums.cross_entropy.requires_grad
    grads = torch.autograd.grad(sums.objective / 7, [rows, head.weight])
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-14)


def test_a_frozen_head_gets_no_gradient_and_its_rows_do() -> None:
    head, rows, targets = inputs()
    head.requires_grad_(False)
    head_loss(head, rows, targets).objective.backward()
    assert head.weight.grad is None
    assert rows.grad is not None and rows.grad.abs().max() > 0


def test_without_gradients_the_sums_are_the_same() -> None:
    head, rows, targets = inputs()
    expected = head_loss(head, rows, targets, l2wrap=1e-2)
    with torch.no_grad():
        sums = head_loss(head, rows, targets, l2wrap=1e-2)
    assert torch.equal(sums.objective, expected.objective.detach())


def test_l2wrap_has_the_gradient_of_the_official_one() -> None:
    head, rows, targets = inputs(1)
    without = torch.autograd.grad(head_loss(head, rows, targets).objective, rows)[0]
    with_pull = torch.autograd.grad(head_loss(head, rows, targets, l2wrap=1e-4).objective, rows)[0]
    logits = head(rows)
    # officially: 1e-4 times the largest logit, at its place, beside the gradient of the loss
    pull = torch.zeros_like(logits).scatter(
        -1, logits.argmax(-1, keepdim=True), logits.max(-1, keepdim=True).values * 1e-4
    )
    torch.testing.assert_close(with_pull - without, pull @ head.weight, rtol=1e-8, atol=1e-12)
