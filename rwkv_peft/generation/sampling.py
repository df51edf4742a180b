"""Drawing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.config import require_finite
from rwkv_peft.errors import ConfigError


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
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def draw(self, logits_V: Tensor) -> int:
        """The next token, drawn from its logits (V,)."""
        s = self._sampling
        logits = logits_V.float().cpu()[: len(self._counts)]
        logits = logits - (self._counts > 0) * s.presence - self._counts * s.frequency
        if s.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = torch.softmax(logits / s.temperature, -1)
            ordered, ids = probabilities.sort(descending=True)
            # a token stays if those before it do not reach top_p, so the first always does
            ordered[ordered.cumsum(-1) - ordered >= s.top_p] = 0
            token = int(ids[torch.multinomial(ordered, 1, generator=self._generator)])
        self._counts *= s.decay
        self._counts[token] += 1
        return token
