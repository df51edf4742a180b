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
        system: what stands before the first turn, nothing if it is empty.
    """

    def __init__(
        self,
        model: RWKV,
        sampling: Sampling,
        *,
        template: Template | None = None,
        seed: int | None = None,
        system: str = "",
    ) -> None:
        self._template = template or TEMPLATES["chat"]
        self._tokenizer = Tokenizer(model.model_config.vocab_size)
        self._tokenizer.require_own()
        self._session = Session(model, self._tokenizer)
        num_tokens = count_known_tokens(model, self._tokenizer)
        self._sampler = Sampler(sampling, num_tokens, seed)
        self._start = self._session.snapshot()
        self.reset(system)

    @property
    def turns(self) -> list[Turn]:
        """The dialogue so far."""
        return list(self._turns)

    def reset(self, system: str = "") -> None:
        """Forgets the dialogue.

        Args:
            system: of the one that begins.
        """
        self._turns = [Turn("system", system)] if system else []
        self._session.restore(self._start)
        # the text that the session's state stands behind
        self._read = ""

    def reply(self, text: str, max_tokens: int = 1024) -> Iterator[str]:
        """The answer to a turn of the user, in pieces; it begins with the template's opening.

        Of an answer that is broken off, by closing the iterator or by an exception, what was said
        stays in the dialogue.
        """
        turns = [*self._turns, Turn("user", text)]
        prompt = self._template.prompt(turns)
        if not prompt.startswith(self._read):
            # the template has rewritten earlier turns, or a turn was broken off
            self._session.restore(self._start)
            self._read = ""
        before = self._session.snapshot()
        new, self._read = prompt[len(self._read) :], "\0"
        self._session.read(self._tokenizer.encode(new))
        answer = ""
        try:
            if self._template.opening:
                yield self._template.opening
            tokens = self._session.generate(self._sampler, max_tokens)
            for piece in cut_at_stop(self._tokenizer.decode_stream(tokens), self._template.stops):
                answer += piece
                yield piece
        finally:
            self._turns = [*turns, Turn("assistant", self._template.opening + answer)]
            # tokens past the stop were read too: go back, and on from the text of the answer alone
            self._session.restore(before)
            self._session.read(self._tokenizer.encode(new + answer.rstrip()))
            self._read = prompt + answer.rstrip()
