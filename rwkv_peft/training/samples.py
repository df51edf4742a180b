"""What a model answers to fixed prompts while it is trained, so that a person sees it change."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rwkv_peft.config import TrainConfig
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import Headings, find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError
from rwkv_peft.generation.engine import Session, count_known_tokens, cut_at_stop
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.models.base import RWKV
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.state import RWKVState

# tokens of an answer: enough to see how it speaks
NUM_TOKENS = 100
EXAMPLE = '{"prompt": "The king said"} or {"user": "Who are you?"}'


class Prompt(NamedTuple):
    """A text to continue.

    Attributes:
        shown: as the user gave it.
        tokens: what the model reads.
        opening: of the answer, which the template has written already.
        stops: what ends the answer.
    """

    shown: str
    tokens: list[int]
    opening: str = ""
    stops: tuple[str | Headings, ...] = ()


def read_prompts(config: TrainConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of --val_prompts: of each line that is not empty, or of rows of JSON.

    Raises:
        ConfigError: the file cannot be read, or holds no prompt.
    """
    path = config.val_prompts
    if not path:
        return []
    try:
        # JSON may hold other characters that end a line, such as U+2028, as they are
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--val_prompts {path} cannot be read: {reason}") from error
    is_json = Path(path).suffix.lower() in (".jsonl", ".json")
    prompts = [
        _read_row(f"--val_prompts {path}:{number}", line, config.template_name, tokenizer)
        if is_json
        else Prompt(line, tokenizer.encode(line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise ConfigError(f"--val_prompts {path} holds no prompt: write one a line")
    return prompts


def _read_row(where: str, line: str, template: str, tokenizer: Tokenizer) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: a row is like {EXAMPLE}") from error
    keys = [k for k in ("prompt", "user") if isinstance(row, dict) and row.get(k)]
    if len(keys) != 1 or not isinstance(row[keys[0]], str):
        raise ConfigError(f"{where} has no prompt: a row is like {EXAMPLE}")
    text = row[keys[0]]
    if keys == ["prompt"]:
        return Prompt(text, tokenizer.encode(text))
    found = find_template(template)
    tokens = tokenizer.encode(found.prompt([Turn("user", text)]))
    return Prompt(text, tokens, found.opening, tuple(found.stops))


class _Likeliest(Sampler):
    """Takes the token that is likeliest to the first rank, so that all go on by the same."""

    def __init__(self, num_tokens: int, strategy: Strategy) -> None:
        super().__init__(Sampling(temperature=0), num_tokens, seed=0)
        self._strategy = strategy

    def draw(self, logits_V: Tensor) -> int:
        draw = super().draw
        return int(self._strategy.from_first(lambda: draw(logits_V)))


def sample(
    model: RWKV,
    prompts: Iterable[Prompt],
    state: RWKVState | None = None,
    *,
    num_tokens: int | None = None,
    seconds: float = math.inf,
    strategy: Strategy | None = None,
) -> Iterator[str]:
    """The likeliest answer to each prompt, token by token.

    Args:
        state: of one row, in which each text begins; the model's own start if None.
        num_tokens, seconds: after which an answer is cut off; NUM_TOKENS if None.
        strategy: by which ranks that have parts of the model answer together; None: this one can.
    """
    tokenizer = Tokenizer(model.model_config.vocab_size)
    for prompt in prompts:
        session = Session(model, tokenizer)
        session.state = state
        session.read(prompt.tokens)
        sampler = _Likeliest(count_known_tokens(model, tokenizer), strategy or Strategy())
        end = time.monotonic() + seconds
        tokens = session.generate(sampler, NUM_TOKENS if num_tokens is None else num_tokens)
        in_time = takewhile(lambda _, end=end: time.monotonic() < end, tokens)  # type: ignore[misc]
        pieces = tokenizer.decode_stream(in_time)
        yield prompt.opening + "".join(cut_at_stop(pieces, prompt.stops))
