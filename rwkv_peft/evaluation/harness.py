"""Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`), on RWKV's recurrent form."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rwkv_peft.data.tokenizer import EOD, Tokenizer
from rwkv_peft.errors import ConfigError
from rwkv_peft.evaluation.continuations import Likelihood, find_likelihoods
from rwkv_peft.generation.engine import Session, count_known_tokens, cut_at_stop
from rwkv_peft.generation.sampling import Sampler, Sampling
from rwkv_peft.models.base import RWKV

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# tokens of an answer, where a task says no other number
MAX_TOKENS = 256


def run_tasks(
    model: RWKV,
    tasks: Sequence[str],
    *,
    include_path: str = "",
    num_fewshot: int | None = None,
    limit: float | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of each task by their names in lm-eval, such as acc,none.

    Args:
        tasks: names, or paths of YAML files.
        include_path: folder of further tasks; its own alone are looked for there first.
        num_fewshot: examples before each question; None: as the task has it.
        limit: questions of each task, or their share if below 1; None: all.
    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.
    """
    lm_eval = require_lm_eval()
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=include_path or None, include_defaults=False)
    # the list of all its tasks takes seconds to read
    is_local = set(tasks) <= set(own.all_tasks) or all(os.path.isfile(task) for task in tasks)
    manager = own if is_local else TaskManager(include_path=include_path or None)
    unknown = [x for x in tasks if not os.path.isfile(x) and not manager.match_tasks([x])]
    if unknown:
        raise ConfigError(
            f"--tasks {unknown[0]}: lm-eval knows no such task: look at lm-eval ls tasks, or give "
            "--include_path with the folder of your own"
        )
    found = lm_eval.simple_evaluate(
        model=harness_model(model),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found is not None
    return {
        name: {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        for name, metrics in found["results"].items()
    }


def harness_model(model: RWKV) -> "LM":
    """A model as lm-eval takes it, for `lm_eval.simple_evaluate(model=…)`."""
    require_lm_eval()
    built: LM = _make_class()(model)
    return built


def require_lm_eval() -> Any:
    """The package lm_eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed: pip install 'rwkv-peft[eval]'"
        ) from error
    return lm_eval


class HarnessMethods:
    """What lm-eval asks of a model, for a class that derives from its `TemplateLM` too.

    Texts begin with token 0; there is no window, as the state has read all before.
    """

    def __init__(self, model: RWKV) -> None:
        super().__init__()
        self._model, self._tokenizer = model, Tokenizer(model.model_config.vocab_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and stands before each."""
        return EOD

    @property
    def tokenizer_name(self) -> str:
        """For the caches of lm-eval."""
        return f"rwkv-world-{self._tokenizer.vocab_size}"

    def tok_encode(self, string: str, *_: object, **__: object) -> list[int]:
        """Tokens of a text."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens before a continuation and its own, as they are within the whole text.

        A token across the border is of the continuation: what comes before does not tell it.
        """
        border = len(context.encode("utf-8", "surrogatepass"))
        ids, spans = self._tokenizer.encode_with_offsets(context + continuation)
        count = sum(end <= border for _, end in spans)
        return [EOD, *ids[:count]], ids[count:]

    def _loglikelihood_tokens(self, requests: list[Any], **_: object) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations; those of one context share its state."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(i)
        found: dict[int, Likelihood] = {}
        for context, members in groups.items():
            likelihoods = find_likelihoods(self._model, context, [requests[i][2] for i in members])
            found |= zip(members, likelihoods, strict=True)
        return [(found[i].log_probability, found[i].is_greedy) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], **_: object) -> list[float]:
        """Log-probabilities of whole texts behind token 0, however long they are."""
        texts = [self._tokenizer.encode(request.args[0]) for request in requests]
        return [find_likelihoods(self._model, [EOD], [x])[0].log_probability for x in texts]

    def generate_until(self, requests: list[Any], **_: object) -> list[str]:
        """Answers up to a stop text, greedy unless the task says otherwise."""
        return ["".join(self._generate(*request.args)) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> Iterator[str]:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
        sampling = Sampling(temperature=temperature, top_p=options.get("top_p", 1.0))
        session = Session(self._model, self._tokenizer)
        session.read([EOD, *self._tokenizer.encode(prompt)])
        num_tokens = count_known_tokens(self._model, self._tokenizer)
        tokens = session.generate(
            Sampler(sampling, num_tokens, seed=0), options.get("max_gen_toks", MAX_TOKENS)
        )
        return cut_at_stop(self._tokenizer.decode_stream(tokens), [x for x in stops if x])


@cache
def _make_class() -> type:
    """The class, made when lm-eval is there to derive it from."""
    from lm_eval.api.model import TemplateLM

    return type("RWKVModel", (HarnessMethods, TemplateLM), {})
