"""One answer of a model before it is trained and after, so that a person sees what it learned."""

from dataclasses import dataclass

from rwkv_peft.data.documents import Documents
from rwkv_peft.data.templates import find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import RwkvPeftError
from rwkv_peft.training.evaluate import undisturbed
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.samples import Prompt, sample
from rwkv_peft.training.settings import Settings
from rwkv_peft.training.validation import one_row

# of an answer; the seconds are for a large model on a CPU
NUM_TOKENS, SECONDS = 48, 10.0
# tokens of a prompt at most, and of one that is the beginning of a text
LONGEST_PROMPT, BEGINNING = 1024, 16


@dataclass(slots=True)
class Answers:
    """One answer, before the first step and after the last, by the likeliest tokens.

    Attributes:
        question: what is answered, the first of the data.
    """

    question: str = ""
    before: str = ""
    after: str = ""
    _prompt: Prompt | None = None
    _state: str = ""

    def ask_before(self, run: Run) -> None:
        """Takes the first question of the data, and the answer of the model as it begins."""
        documents, settings = run.plan.batches.documents, run.settings
        if settings.num_ranks > 1:
            return
        tokenizer = Tokenizer(run.model.model_config.vocab_size)
        self._prompt = find_question(documents, tokenizer, settings)
        if self._prompt is not None:
            self.question = self._prompt.shown
            if documents.states is not None:
                self._state = str(documents.states[documents.indices[0]])
            # what a run that goes on began with is gone
            self.before = "" if run.progress.step else self._ask(run)

    def ask_after(self, run: Run) -> None:
        """Takes the answer of the model as it is now."""
        if self._prompt is not None and not run.stopped_by:
            self.after = self._ask(run)

    def _ask(self, run: Run) -> str:
        assert self._prompt is not None
        with undisturbed(run.model):
            state = run.target.initial_state(one_row(self._state))
            limits = {"num_tokens": NUM_TOKENS, "seconds": SECONDS}
            (text,) = sample(run.model, [self._prompt], state, **limits)  # type: ignore[arg-type]
        return text


def find_question(documents: Documents, tokenizer: Tokenizer, settings: Settings) -> Prompt | None:
    """The first document up to its first answer, or the beginning of a text that has none.

    None where the tokens have no text.
    """
    if tokenizer.is_foreign:
        return None
    first = documents.indices[0]
    part = slice(int(documents.starts[first]), int(documents.starts[first + 1]))
    tokens = [int(x) for x in documents.tokens[part]]
    if tokens and tokens[-1] == tokenizer.eod:
        tokens.pop()
    trained = None if documents.weights is None else documents.weights[part][: len(tokens)]
    text = tokenizer.decode(tokens)
    template = find_template(settings.template_name)
    try:
        pieces = template.parse(text)
    except RwkvPeftError:
        pieces = []
    asked = ""
    if trained is not None and trained[1:].any():
        start = 1 + int((trained[1:] != 0).argmax())
    else:
        bodies = [i for i, x in enumerate(pieces) if (x.role, x.part) == ("assistant", "body")]
        before = "".join(x.text for x in pieces[: bodies[0]]) if bodies else ""
        start = len(tokenizer.encode(before)) or min(BEGINNING, max(1, len(tokens) // 2))
    read = tokens[max(0, start - LONGEST_PROMPT) : start]
    said = tokenizer.decode(tokens[:start])
    for piece in pieces:
        is_question = piece.role == "user" and piece.part == "body"
        if is_question and piece.text.strip() in said:
            asked = piece.text.strip()
    return Prompt(asked or said.strip(), read, stops=tuple(template.stops)) if read else None
