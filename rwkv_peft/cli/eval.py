"""`rwkv-peft eval MODEL DATA` and `rwkv-peft eval MODEL --tasks NAMES`"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rwkv_peft.cli.given import complete, require_data, require_model
from rwkv_peft.cli.options import AdapterOptions
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import DataConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_json, print_line

if TYPE_CHECKING:
    from rwkv_peft.evaluation.texts import TextScore
    from rwkv_peft.models.base import RWKV


@dataclass(frozen=True, slots=True)
class EvalOptions(AdapterOptions, DataConfig):
    """What to evaluate, and on what."""

    load_model: str = ""
    """Official weights, or a result of training: a file, an adapter, or the folder of a run."""
    adapter: str = ""
    """Adapter to attach: a folder in peft's format, or a file of older RWKV-PEFT."""
    state: str = ""
    """File of a learned state in which every text begins."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness, as a,b: names, or YAML files; in place of data."""
    include_path: str = ""
    """Folder of further tasks."""
    num_fewshot: int | None = None
    """Examples before each question of a task; as the task has it if left out."""
    limit: float | None = None
    """At most so many questions of each task or file of questions, or their share if below 1."""
    accelerator: str = "auto"
    """Device: auto, gpu, cpu, cuda, mps, xpu, musa, npu, or one of several as in cuda:1."""
    precision: str = "auto"
    """Dtype: auto, fp32, bf16, fp16."""
    op: str = "auto"
    """Backend of the recurrence: auto, cuda, triton, fla, torch, reference."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        for name in ("include_path", "num_fewshot"):
            if getattr(self, name) not in ("", None) and not self.tasks:
                raise ConfigError(f"--{name} is for --tasks")
        if (self.limit is not None and self.limit <= 0) or (self.num_fewshot or 0) < 0:
            raise ConfigError("--limit must be above 0, and --num_fewshot not below 0")

    def require_files(self) -> None:
        """Raises ConfigError unless a model and either data or tasks are named."""
        if not self.load_model:
            raise ConfigError("no model given: rwkv-peft eval model.pth data.jsonl")
        if bool(self.tasks) == bool(self.data_file):
            raise ConfigError(
                "--tasks and data exclude each other: give one of them"
                if self.tasks
                else "nothing to evaluate on: give a data file, or --tasks"
            )

    def model(self) -> "RWKV":
        """Loads the model."""
        from rwkv_peft.api import load_model
        from rwkv_peft.device import choose_precision, resolve_device

        device = resolve_device(self.accelerator)
        return load_model(
            self.load_model,
            device=device,
            dtype=choose_precision(device)[0] if self.precision == "auto" else self.precision,
            op=self.op,
            adapter=self.adapter or None,
            lora_alpha=self.lora_alpha,
            pissa_init=self.pissa_init,
            state=self.state or None,
            force=self.force,
        )


def run(args: Sequence[str]) -> int:
    """Prints what was found, as lines or as one JSON object."""
    options = parse(EvalOptions, args, command="eval", positional=("load_model", "data_file"))
    if not options.data_file and not options.tasks:
        require_model(options.load_model, "eval")
    require_data(options.data_file, "rwkv-peft eval model.pth data.jsonl")
    options.require_files()
    options = complete(options, "eval")
    found, lines = _evaluate(options)
    if options.json:
        print_json({"load_model": options.load_model, **found})
    else:
        for line in lines:
            print_line(line)
    return 0


def _evaluate(options: EvalOptions) -> tuple[dict[str, Any], list[str]]:
    if options.tasks:
        return _run_tasks(options)
    from rwkv_peft.data.sources import find_sources
    from rwkv_peft.evaluation.choices import is_choice_file

    parts = [p for x in find_sources(options.data_file, options.data_type) for p in x.parts]
    are_choices = [part.kind == "rows" and is_choice_file(part.path) for part in parts]
    if all(are_choices):
        return _answer(options, [part.path for part in parts])
    if options.limit is not None:
        raise ConfigError("--limit is for tasks and questions: --sft_split takes a part of texts")
    return _score(options)


def _run_tasks(options: EvalOptions) -> tuple[dict[str, Any], list[str]]:
    from rwkv_peft.evaluation.harness import require_lm_eval, run_tasks

    require_lm_eval()
    model = options.model()
    # what others print must not come between the lines of a result
    with redirect_stdout(sys.stderr):
        found = run_tasks(
            model,
            [task.strip() for task in options.tasks.split(",") if task.strip()],
            include_path=options.include_path,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
        )
    lines = [
        f"{name}: {', '.join(f'{metric} {value:.4f}' for metric, value in metrics.items())}"
        for name, metrics in found.items()
    ]
    return {"tasks": found}, lines


def _answer(options: EvalOptions, paths: list[str]) -> tuple[dict[str, Any], list[str]]:
    from rwkv_peft.evaluation.choices import answer_questions, read_questions

    # all are read before the first is answered, so that a broken row costs no time
    questions = [question for path in paths for question in read_questions(path)]
    if options.limit is not None:
        count = options.limit if options.limit >= 1 else options.limit * len(questions)
        questions = questions[: max(1, int(count))]
    subjects: dict[str, list[bool]] = {}
    for answer in answer_questions(options.model(), questions):
        subjects.setdefault(answer.subject, []).append(answer.chosen == answer.right)
    total = _share([x for found in subjects.values() for x in found])
    by_subject = {name: _share(subjects[name]) for name in sorted(subjects) if name}
    lines = [
        f"{name or 'accuracy'}: {100 * x['accuracy']:.2f} % of {x['questions']:,} questions"
        for name, x in {"": total, **by_subject}.items()
    ]
    return {**total, "subjects": by_subject}, lines


def _share(answers: list[bool]) -> dict[str, Any]:
    return {"questions": len(answers), "accuracy": sum(answers) / len(answers)}


def _score(options: EvalOptions) -> tuple[dict[str, Any], list[str]]:
    from rwkv_peft.evaluation.texts import score_texts

    found = score_texts(options.model(), options)
    result = {
        "loss_mask": options.loss_mask,
        **_figures(found.total),
        "files": {path: _figures(x) for path, x in found.files.items()},
        "roles": {role: _figures(x) for role, x in found.roles.items()},
    }
    lines = list(_table({"all": found.total}))
    lines += _table(found.files) if len(found.files) > 1 else ()
    lines += _table({f"words of {role}": x for role, x in found.roles.items()})
    return result, lines


def _figures(score: "TextScore") -> dict[str, Any]:
    return {
        "tokens": score.num_tokens,
        "bytes": score.num_bytes,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def _table(scores: Mapping[str, "TextScore"]) -> Iterator[str]:
    for name, x in scores.items():
        bits = "" if x.bits_per_byte is None else f"{x.bits_per_byte:.4f} bits per byte, "
        yield (
            f"{name}: {bits}loss {x.loss:.4f}"
            + ("" if x.perplexity is None else f", perplexity {x.perplexity:.2f}")
            + f" ({x.num_tokens:,} tokens, {x.num_bytes:,} bytes)"
        )
