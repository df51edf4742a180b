"""Generation with carried state: a token costs the same however long the text before it is."""

from collections.abc import Iterator, Sequence

import torch

from rwkv_peft.data.templates import Headings
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.generation.token import TokenStep, is_shared
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState

# tokens of a prompt that are read at a time, so that memory does not grow with its length
PREFILL = 1024


class Session:
    """A text that goes on: a model, its state after the text so far, and the next logits.

    Attributes:
        state: the state after the last token, and before the first the one to begin with; None:
            zeros.
    """

    def __init__(self, model: RWKV, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.state: RWKVState | None = None
        self._logits: torch.Tensor | None = None
        self._step = TokenStep(model)
        # blocks that are gathered keep their memory, and may be trained later
        self._mode = torch.no_grad if is_shared(model) else torch.inference_mode

    def read(self, tokens: Sequence[int]) -> None:
        """Moves the state over given tokens."""
        with self._mode():
            self._read(tokens)

    def _read(self, tokens: Sequence[int]) -> None:
        if len(tokens) == 1 and self.state is not None and self._step.is_used:
            self._logits, self.state = self._step(tokens[0], self.state)
            return
        device = self._model.emb.weight.device
        for start in range(0, len(tokens), PREFILL):
            chunk = torch.tensor([list(tokens[start : start + PREFILL])], device=device)
            hidden, layers = self._model.hidden(chunk, self.state)
            self.state = RWKVState.from_layers(layers)
        if len(tokens):
            self._logits = self._model.head(hidden[:, -1])[0]

    def snapshot(self) -> tuple[RWKVState | None, torch.Tensor | None]:
        """The state and the next logits, for `restore`; neither is ever written in place."""
        if self.state is None or self._logits is None or not self._step.is_used:
            return self.state, self._logits
        return RWKVState(*(x.clone() for x in self.state)), self._logits.clone()

    def restore(self, snapshot: tuple[RWKVState | None, torch.Tensor | None]) -> None:
        """Goes back to an earlier snapshot of this session."""
        self.state, self._logits = snapshot

    def generate(self, sampler: Sampler, max_tokens: int) -> Iterator[int]:
        """Draws and reads up to `max_tokens` tokens; the end-of-document token ends the text.

        A caller that stops early leaves the session after the last token that it was given.
        """
        if self._logits is None:
            raise DataError("there is no prompt to go on from: give at least one character")
        for _ in range(max_tokens):
            token = sampler.draw(self._logits)
            if token == self._tokenizer.eod:
                return
            self.read([token])
            yield token


def count_known_tokens(model: RWKV, tokenizer: Tokenizer) -> int:
    """Number of ids, from 0, that are in the vocabularies of both model and tokenizer."""
    return min(model.model_config.vocab_size, tokenizer.num_tokens)


def generate(
    model: RWKV,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str | Headings] = (),
    seed: int | None = None,
) -> str:
    """The text that a model generates after a prompt.

    Args:
        max_tokens: most tokens to draw.
        stop: texts that end the answer and are left out of it, or `stops` of a template.
        seed: of the draws; None: another in every call.
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
    stop: Sequence[str | Headings] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """The text that `generate` returns, in pieces as it is generated."""
    tokenizer = Tokenizer(model.model_config.vocab_size)
    session = Session(model, tokenizer)
    session.read(tokenizer.encode(prompt))
    sampler = Sampler(sampling or Sampling(), count_known_tokens(model, tokenizer), seed)
    yield from cut_at_stop(tokenizer.decode_stream(session.generate(sampler, max_tokens)), stop)


def cut_at_stop(pieces: Iterator[str], stop: Sequence[str | Headings]) -> Iterator[str]:
    """The pieces of a text up to its first end, which may lie across pieces.

    Text that may yet become an end is held back until it is known to be none.
    """
    ends = [_Text(end) if isinstance(end, str) else end for end in stop]
    held = ""
    for piece in pieces:
        held += piece
        if found := [place for end in ends if (place := end.find_end(held)) >= 0]:
            yield held[: min(found)]
            return
        settled = min((end.count_settled(held) for end in ends), default=len(held))
        if settled:
            yield held[:settled]
            held = held[settled:]
    for end in ends:
        held = end.trim_last(held)
    yield held


class _Text(str):
    """A fixed text that ends a generated one; its methods are those of `Headings`."""

    def find_end(self, text: str) -> int:
        return text.find(self)

    def count_settled(self, text: str) -> int:
        """All but the longest end of `text` with which this one begins."""
        lengths = range(min(len(text), len(self)), 0, -1)
        return len(text) - next((n for n in lengths if text.endswith(self[:n])), 0)

    def trim_last(self, text: str) -> str:
        return text
