"""One token is a graph on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rwkv_peft
from rwkv_peft.generation.engine import Session
from rwkv_peft.generation.sampling import Sampler, Sampling


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_a_graph_are_those_of_plain_forwards(
    dtype: str, make_model_file: Callable[..., Path]
) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model = rwkv_peft.load_model(make_model_file(), device=device, dtype=dtype)
    tokenizer = rwkv_peft.Tokenizer(320)

    def answer(session: Session) -> list[int]:
        return list(session.generate(Sampler(Sampling(1.0, 0.9), 320, seed=1), 40))

    plain, graphed = Session(model, tokenizer), Session(model, tokenizer)
    assert graphed._step.is_used
    plain._step.is_used = False
    for session in (plain, graphed):
        session.read(tokenizer.encode("a prompt"))
    before = graphed.snapshot()
    first = answer(plain)
    assert answer(graphed) == first
    assert graphed._step._graph is not None and graphed._step.is_used
    assert plain.state is not None and graphed.state is not None
    for x, y in zip(plain.state, graphed.state, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)
    graphed.restore(before)
    assert answer(graphed) == first


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_as_it_is(
    make_model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model = rwkv_peft.load_model(make_model_file(), device=device)
    tokenizer = rwkv_peft.Tokenizer(320)
    head = model.head.forward

    def waiting(x: torch.Tensor) -> torch.Tensor:
        return head(x) + 0 * x.sum().item()

    monkeypatch.setattr(model.head, "forward", waiting)
    session = Session(model, tokenizer)
    session.read(tokenizer.encode("a prompt"))
    with pytest.warns(UserWarning, match="without a graph"):
        tokens = list(session.generate(Sampler(Sampling(temperature=0), 320), 8))
    plain = Session(model, tokenizer)
    plain._step.is_used = False
    plain.read(tokenizer.encode("a prompt"))
    assert list(plain.generate(Sampler(Sampling(temperature=0), 320), 8)) == tokens
