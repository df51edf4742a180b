"""The probability of continuations of a text, its own state computed once for all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rwkv_peft.evaluation.texts import WINDOW, losses_of_hidden
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState


class Likelihood(NamedTuple):
    """Of one continuation.

    Attributes:
        log_probability: natural logarithm, of all its tokens.
        is_greedy: whether each of its tokens is the likeliest.
    """

    log_probability: float
    is_greedy: bool


@torch.inference_mode()
def find_likelihoods(
    model: RWKV, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """The likelihood of each continuation behind a prompt of at least one token.

    The prompt goes through once, in windows; all continuations begin from its state.
    """
    device = model.emb.weight.device
    state: RWKVState | None = None
    for start in range(0, len(prompt), WINDOW):
        part = torch.tensor([list(prompt[start : start + WINDOW])], device=device)
        hidden, layers = model.hidden(part, state)
        state = RWKVState.from_layers(layers)
    assert state is not None
    last = hidden[:, -1:]
    found = []
    for tokens in continuations:
        if not len(tokens):
            found.append(Likelihood(0.0, True))
            continue
        targets = torch.tensor(list(tokens), device=device)
        total, is_greedy, own = 0.0, True, state
        before = last
        for start in range(0, len(tokens), WINDOW):
            part = targets[start : start + WINDOW]
            # the token before each: its hidden state foretells this one
            hidden, layers = model.hidden(part[None], own)
            own = RWKVState.from_layers(layers)
            rows = torch.cat((before, hidden[:, :-1]), 1)[0]
            before = hidden[:, -1:]
            total -= losses_of_hidden(model, rows, part).double().sum().item()
            is_greedy = is_greedy and all(
                bool((model.head(x).argmax(-1) == y).all())
                for x, y in zip(rows.split(64), part.split(64), strict=True)
            )
        found.append(Likelihood(total, is_greedy))
    return found
