"""Dialogue in the template of RWKV's chat models.

Source: RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt: turns are `User: …` and `Assistant: …`, separated
by a blank line, which therefore may not occur inside a turn of the user.
"""

import re
from collections.abc import Iterator

from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.generation.engine import Session, num_known_tokens, until_stop
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.models.base import RWKV

STOPS = ("\n\nUser", "\n\nSystem")


def turn_prompt(text: str) -> str:
    """The prompt of a user's turn, without a space at its end, which would break a token."""
    clean = re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()
    return f"User: {clean}\n\nAssistant:"


class Chat:
    """A dialogue that keeps its state from turn to turn."""

    def __init__(self, model: RWKV, sampling: Sampling, *, seed: int | None = None) -> None:
        self._tokenizer = Tokenizer(model.geometry.vocab_size)
        self._session = Session(model, self._tokenizer)
        num_tokens = num_known_tokens(model, self._tokenizer)
        self._sampler = Sampler(sampling, num_tokens, seed)
        self._has_spoken = False

    def reply(self, text: str, max_tokens: int = 1024) -> Iterator[str]:
        """The answer to one turn of the user, piece by piece."""
        # the answer before is closed here, since it may have ended in any of several ways
        prompt = ("\n\n" if self._has_spoken else "") + turn_prompt(text)
        before = self._session.snapshot()
        self._session.read(self._tokenizer.encode(prompt))
        answer = ""
        tokens = self._session.say(self._sampler, max_tokens)
        for piece in until_stop(self._tokenizer.decode_stream(tokens), STOPS):
            answer += piece
            yield piece
        # what was drawn past the stop is unsaid: the dialogue goes on from its clean text
        self._session.restore(before)
        self._session.read(self._tokenizer.encode(prompt + answer.rstrip()))
        self._has_spoken = True
