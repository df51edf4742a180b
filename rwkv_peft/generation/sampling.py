"""Drawing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.config import require_finite
from rwkv_peft.errors import ConfigError

# numbers of likeliest tokens that are looked at before all are
CANDIDATES = (64, 1024)
# above the error of a sum of so many float32 probabilities
MARGIN = 1e-5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws from the smallest set of tokens with at least this probability.
        presence: subtracted from the logits of tokens that were drawn already.
        frequency: subtracted from a token's logit for each time that it was drawn.
        decay: factor on all these counts with each further token.
    """

    temperature: float = 1.0
    top_p: float = 0.5
    presence: float = 0.0
    frequency: float = 0.0
    decay: float = 0.996

    def __post_init__(self) -> None:
        require_finite(self)
        if self.temperature < 0:
            raise ConfigError(f"--temperature must not be below 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p must lie in (0, 1], got {self.top_p}")


class Sampler:
    """Draws tokens one after the other and counts them for the penalties.

    Args:
        num_tokens: ids from this on are never drawn.
        seed: of the draws; None: a random one.
    """

    def __init__(self, sampling: Sampling, num_tokens: int, seed: int | None = None) -> None:
        self._sampling = sampling
        self._counts = torch.zeros(num_tokens)
        self._generator = torch.Generator()
        self._unused = 0
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def draw(self, logits_V: Tensor) -> int:
        """The next token, drawn from its logits (V,)."""
        s = self._sampling
        # before the logits are waited for
        self._pass_over()
        logits = logits_V.to("cpu", torch.float32)[: len(self._counts)]
        has_penalties = bool(s.presence or s.frequency)
        if has_penalties:
            logits = logits - (self._counts > 0) * s.presence - self._counts * s.frequency
        if s.temperature == 0:
            token = int(logits.argmax())
        else:
            token = self._draw(torch.softmax(logits / s.temperature, -1))
        if has_penalties:
            self._counts *= s.decay
            self._counts[token] += 1
        return token

    def _draw(self, probabilities: Tensor) -> int:
        """The token whose probability over an exponential number is largest, among the likeliest.

        So does `torch.multinomial`, with a number for each token of the vocabulary.
        """
        top_p = self._sampling.top_p
        ordered, ids = _order_likeliest(probabilities, top_p)
        # a token stays if those before it do not reach top_p, so the first always does
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        numbers = torch.empty_like(ordered).exponential_(generator=self._generator)
        self._unused = len(probabilities) - len(ordered)
        return int(ids[(ordered / numbers).argmax()])

    def _pass_over(self) -> None:
        """Takes from the generator what belongs to the tokens that were not among the likeliest.

        A seed gives the same text however many are looked at. The float64 numbers of a uniform
        distribution take as much of it as exponential ones, in a sixth of the time.
        """
        if self._unused:
            torch.empty(self._unused, dtype=torch.float64).uniform_(generator=self._generator)
            self._unused = 0


def _order_likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The first values and ids of a stable descending sort, at least those that reach `top_p`.

    A sort of a whole vocabulary takes 8 ms; most often a few tokens are all that is wanted.
    """
    for count in CANDIDATES:
        if count >= len(probabilities):
            break
        found, ids = probabilities.topk(count, sorted=False)
        # of others as likely as the last some may be missing
        is_whole = found > found.min()
        found, ids = found[is_whole], ids[is_whole]
        if found.sum() > top_p + MARGIN:
            ids, order = ids.sort()
            found, order = found[order].sort(descending=True, stable=True)
            return found, ids[order]
    found, ids = probabilities.sort(descending=True, stable=True)
    return found, ids
