"""Multiple choice in the form of RWKV's own MMLU script (RWKV-LM, RWKV-v7/rwkv_mmlu_eval.py)."""

import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_peft.data.files import parse_json, read_rows
from rwkv_peft.data.tokenizer import EOD, Tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.evaluation.continuations import find_likelihoods
from rwkv_peft.models.base import RWKV

KEYS = ("question", "choices", "answer")
EXAMPLE = '{"question": "What is 1+1?", "choices": ["1", "2"], "answer": 1}'
LETTERS = string.ascii_uppercase


class Question(NamedTuple):
    """One question.

    Attributes:
        choices: two or more, in their order.
        answer: index of the right one.
        subject: such as high_school_physics; "" for none.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    @property
    def prompt(self) -> str:
        """The text behind which the model is to give the letter of a choice."""
        subject = f" in {self.subject.replace('_', ' ')}" if self.subject else ""
        lines = [f"User: You are a very talented expert{subject}. Answer this question:"]
        lines += [self.question]
        lines += [f"{x}. {choice}" for x, choice in zip(LETTERS, self.choices, strict=False)]
        text = "\n".join(lines) + "\n\nAssistant: The answer is"
        return text.replace("\r\n", "\n").strip()


class Answer(NamedTuple):
    """What a model answers to a question: the index of its choice, and of the right one."""

    subject: str
    chosen: int
    right: int


def is_choice_file(path: str | Path) -> bool:
    """Whether the first row of a file has a question, choices and an answer."""
    try:
        row = next((_parse(x.content) for x in read_rows(path)), None)
    except DataError:
        # who reads all of it says which row
        return False
    return isinstance(row, dict) and set(KEYS) <= set(row)


def read_questions(path: str | Path) -> Iterator[Question]:
    """The questions of a file of rows: jsonl, parquet, csv …

    Raises:
        DataError: a row is no question; the message names file and line.
    """
    for line, content in read_rows(path):
        try:
            yield _read_question(_parse(content))
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}; a row is like {EXAMPLE}") from error


def answer_questions(model: RWKV, questions: Iterable[Question]) -> Iterator[Answer]:
    """The likeliest choice of each question: of " A", " B" … behind the prompt, after token 0."""
    tokenizer = Tokenizer(model.model_config.vocab_size)
    letters = [tokenizer.encode(f" {x}") for x in LETTERS]
    for question in questions:
        prompt = [EOD, *tokenizer.encode(question.prompt)]
        found = find_likelihoods(model, prompt, letters[: len(question.choices)])
        scores = [x.log_probability for x in found]
        yield Answer(question.subject, scores.index(max(scores)), question.answer)


def _parse(content: object) -> object:
    if isinstance(content, DataError):
        raise content
    return parse_json(content) if isinstance(content, bytes) else content


def _read_question(row: Any) -> Question:
    missing = [key for key in KEYS if not isinstance(row, dict) or row.get(key) is None]
    if missing:
        raise DataError(f"no {', '.join(missing)}")
    choices = row["choices"]
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"choices must be a list of 2 to {len(LETTERS)} texts")
    texts = tuple(str(choice) for choice in choices)
    answer = _find_answer(row["answer"], texts)
    subject = row.get("subject") or ""
    return Question(str(row["question"]), texts, answer, str(subject))


def _find_answer(given: object, choices: tuple[str, ...]) -> int:
    """The index that an answer means: a number from 0, a letter, or the text of a choice."""
    if isinstance(given, str):
        if given in choices:
            return choices.index(given)
        word = given.strip().upper()
        # tables of text hold numbers as text
        if word.isdecimal() and len(word) < 5:
            given = int(word)
        elif len(word) == 1:
            given = LETTERS.find(word)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(choices):
        raise DataError(
            "the answer must be the number of a choice from 0, its letter or its text, got "
            f"{str(given)[:100]}"
        )
    return given
