"""Generation with carried state: one token costs the same however long the text before it."""

from collections.abc import Iterator, Sequence

import torch

from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState

# a prompt is read in stretches, so that its length costs no memory
PREFILL = 1024


class Session:
    """A text under way: a model, the state after what was read and said, and the next logits.

    Attributes:
        state: after the last token that was read.
    """

    def __init__(self, model: RWKV, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.state: RWKVState | None = None
        self._logits: torch.Tensor | None = None

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> None:
        """Takes tokens in as text that is given."""
        device = self._model.emb.weight.device
        for start in range(0, len(tokens), PREFILL):
            stretch = torch.tensor([list(tokens[start : start + PREFILL])], device=device)
            hidden, layers = self._model.hidden(stretch, self.state)
            self.state = RWKVState.from_layers(layers)
        if len(tokens):
            self._logits = self._model.head(hidden[:, -1])[0]

    def snapshot(self) -> tuple[RWKVState | None, torch.Tensor | None]:
        """All that changes as the text goes on; states are never written in place."""
        return self.state, self._logits

    def restore(self, snapshot: tuple[RWKVState | None, torch.Tensor | None]) -> None:
        """Goes back to a snapshot of this session."""
        self.state, self._logits = snapshot

    def say(self, sampler: Sampler, max_tokens: int) -> Iterator[int]:
        """Draws up to `max_tokens` tokens and takes each in; ends after the end of document.

        A caller that stops early leaves the session after the last token it was given.
        """
        if self._logits is None:
            raise DataError("there is no prompt to go on from: give at least one character")
        for _ in range(max_tokens):
            token = sampler.draw(self._logits)
            if token == self._tokenizer.eod:
                return
            self.read([token])
            yield token


def num_known_tokens(model: RWKV, tokenizer: Tokenizer) -> int:
    """Ids that may be drawn: in the model's vocabulary and with text in the tokenizer's."""
    return min(model.model_config.vocab_size, tokenizer.num_tokens)


def generate(
    model: RWKV,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> str:
    """The text that a model gives after a prompt.

    Args:
        max_tokens: most tokens to draw.
        stop: texts before which the answer ends; they are not part of it.
        seed: makes the draws repeatable.
    Raises:
        DataError: the prompt is empty.
    """
    return "".join(
        stream(model, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, seed=seed)
    )


def stream(
    model: RWKV,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """Like `generate`, piece by piece as the text comes."""
    tokenizer = Tokenizer(model.model_config.vocab_size)
    session = Session(model, tokenizer)
    session.read(tokenizer.encode(prompt))
    sampler = Sampler(sampling or Sampling(), num_known_tokens(model, tokenizer), seed)
    yield from until_stop(tokenizer.decode_stream(session.say(sampler, max_tokens)), stop)


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Passes pieces of text on up to the first of the stop texts, which may span pieces."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        keep = max((_overlap(held, text) for text in stop), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return max(
        (n for n in range(1, min(len(text), len(stop)) + 1) if text.endswith(stop[:n])), default=0
    )
