"""Dialogue in the template that a model was trained with."""

from collections.abc import Iterator

from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import TEMPLATES, Template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.generation.engine import Session, count_known_tokens, cut_at_stop
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.models.base import RWKV


class Chat:
    """A dialogue that keeps its state from turn to turn.

    Args:
        template: how turns are written; that of RWKV's chat models if None.
    """

    def __init__(
        self,
        model: RWKV,
        sampling: Sampling,
        *,
        template: Template | None = None,
        seed: int | None = None,
    ) -> None:
        self._template = template or TEMPLATES["chat"]
        self._tokenizer = Tokenizer(model.model_config.vocab_size)
        self._tokenizer.require_own()
        self._session = Session(model, self._tokenizer)
        num_tokens = count_known_tokens(model, self._tokenizer)
        self._sampler = Sampler(sampling, num_tokens, seed)
        self._turns: list[Turn] = []
        self._start, self._read = self._session.snapshot(), ""

    def reply(self, text: str, max_tokens: int = 1024) -> Iterator[str]:
        """The answer to a turn of the user, in pieces; it begins with the template's opening."""
        turns = [*self._turns, Turn("user", text)]
        prompt = self._template.prompt(turns)
        if not prompt.startswith(self._read):
            # the template has rewritten earlier turns
            self._session.restore(self._start)
            self._read = ""
        before = self._session.snapshot()
        new = prompt[len(self._read) :]
        self._session.read(self._tokenizer.encode(new))
        if self._template.opening:
            yield self._template.opening
        answer = ""
        tokens = self._session.generate(self._sampler, max_tokens)
        for piece in cut_at_stop(self._tokenizer.decode_stream(tokens), self._template.stops):
            answer += piece
            yield piece
        # tokens past the stop were read too: go back, and on from the text of the answer alone
        self._session.restore(before)
        self._session.read(self._tokenizer.encode(new + answer.rstrip()))
        self._read = prompt + answer.rstrip()
        self._turns = [*turns, Turn("assistant", self._template.opening + answer)]
