"""`rwkv-peft generate MODEL --prompt P`"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_peft.cli.given import complete, find_run
from rwkv_peft.cli.options import AdapterOptions
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TEMPLATE_FILE
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_answer, print_json
from rwkv_peft.yaml_file import read_yaml

if TYPE_CHECKING:
    from rwkv_peft.data.templates import Headings, Template
    from rwkv_peft.generation.sampling import Sampling
    from rwkv_peft.models.base import RWKV


@dataclass(frozen=True, slots=True)
class ModelOptions(AdapterOptions):
    """Which model to use, where and how it draws."""

    load_model: str = ""
    """Official weights, or a result of training: a file, an adapter, or the folder of a run."""
    adapter: str = ""
    """Adapter to attach: a folder in peft's format, or a file of older RWKV-PEFT."""
    state: str = ""
    """File of a learned state in which every text begins."""
    template: str = "auto"
    """How turns are written: a name or a Jinja file; as in the model's training if auto."""
    max_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 0.5
    """Draws from the likeliest tokens that make up this probability."""
    presence: float = 0.0
    """Lowers the logit of every token drawn before."""
    frequency: float = 0.0
    """Lowers it further with each time it was drawn."""
    random_seed: int = -1
    """Makes the draws repeatable if not negative."""
    accelerator: str = "auto"
    """Device: auto, gpu, cpu, cuda, mps, xpu, musa, npu, or one of several as in cuda:1."""
    precision: str = "auto"
    """Dtype: auto, fp32, bf16, fp16."""
    op: str = "auto"
    """Backend of the recurrence: auto, cuda, triton, fla, torch, reference."""

    def model(self) -> "RWKV":
        """Loads the model."""
        from rwkv_peft.api import load_model
        from rwkv_peft.device import choose_precision, resolve_device

        if not self.load_model:
            raise ConfigError(
                "no model given: give a model, an adapter, a state or the folder of a run first"
            )
        device = resolve_device(self.accelerator)
        precision = choose_precision(device)[0] if self.precision == "auto" else self.precision
        return load_model(
            self.load_model,
            device=device,
            dtype=precision,
            op=self.op,
            adapter=self.adapter or None,
            lora_alpha=self.lora_alpha,
            pissa_init=self.pissa_init,
            state=self.state or None,
            force=self.force,
        )

    def run_template(self) -> "Template":
        """The template named, or that of the run which wrote the model or adapter, or chat."""
        return choose_template(self.template, self.adapter or self.state or self.load_model)

    def sampling(self) -> "Sampling":
        """How to draw."""
        from rwkv_peft.generation.sampling import Sampling

        return Sampling(self.temperature, self.top_p, self.presence, self.frequency)

    @property
    def seed(self) -> int | None:
        """Seed of the draws, None for a new one each time."""
        return None if self.random_seed < 0 else self.random_seed


def without_last_breaks(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text without the line breaks and spaces at its end."""
    held = ""
    for piece in pieces:
        text = held + piece
        shown = text.rstrip()
        held = text[len(shown) :]
        yield shown


def say_undecodable(text: str) -> str:
    """What to do about a text from stdin that is not in its encoding; "" if it is."""
    if text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text):
        return ""
    return (
        f"standard input is not text in {sys.stdin.encoding}: set the environment variable "
        "PYTHONIOENCODING to its encoding, such as utf-8 or gbk"
    )


def choose_template(name: str, model: str) -> "Template":
    """The template named; if auto, that of the run which wrote a model or an adapter, or chat."""
    from rwkv_peft.data.templates import find_template

    if name != "auto":
        return find_template(name)
    folder = find_run(model)
    return find_template(template_of(folder) if folder else "chat")


def template_of(folder: Path) -> str:
    """The template of the run that wrote a folder; chat if no run of this program did.

    A folder may come from anywhere with its model. So no path of its config.yaml is followed: a
    template that is no name is used only if it is the copy that a run keeps in its folder.

    Raises:
        ConfigError: the run's template is neither.
    """
    from rwkv_peft.data.templates import TEMPLATES
    from rwkv_peft.training.folder import read_settings

    try:
        read_yaml(folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"{error}: give --template") from error
    settings = read_settings(folder) or {}
    name, copy = settings.get("template", "chat"), folder / TEMPLATE_FILE
    if isinstance(name, str) and name in TEMPLATES:
        return name
    is_copy = isinstance(name, str) and Path(name).name == TEMPLATE_FILE
    if is_copy and copy.is_file() and not copy.is_symlink():
        return str(copy)
    raise ConfigError(
        f"{folder / 'config.yaml'} names the template {str(name)[:200]!r}, which is not used "
        "unasked: give --template with a file that you trust, or with chat"
    )


@dataclass(frozen=True, slots=True)
class GenerateOptions(ModelOptions):
    """A prompt to continue."""

    prompt: str = ""
    """The text to continue; read from standard input if '-'."""
    user: str = ""
    """In place of a prompt: a user's turn, which is put into the template."""
    stop: list[str] | None = None
    """Texts before which the answer ends, as a JSON list."""
    json: bool = False
    """Print one JSON object: prompt, text, seconds."""


def run(args: Sequence[str]) -> int:
    """Prints the continuation as it is drawn."""
    options = parse(GenerateOptions, args, command="generate", positional=("load_model",))
    prompt = options.prompt
    if prompt == "-" and (problem := say_undecodable(prompt := sys.stdin.read())):
        raise ConfigError(problem)
    if bool(prompt) == bool(options.user):
        raise ConfigError(
            "--prompt is empty: give the text to continue, - for standard input, or a user's turn "
            "by --user"
            if not prompt
            else "--prompt and --user exclude each other"
        )
    options = complete(options, "generate")
    stop: list[str | Headings] = [*(options.stop or ())]
    opening = ""
    if options.user:
        from rwkv_peft.data.records import Turn

        template = options.run_template()
        prompt = template.prompt([Turn("user", options.user)])
        stop += template.stops
        opening = template.opening
    model = options.model()

    from rwkv_peft.generation.engine import stream

    started = time.perf_counter()
    pieces = stream(
        model,
        prompt,
        max_tokens=options.max_tokens,
        sampling=options.sampling(),
        stop=stop,
        seed=options.seed,
    )
    if options.json:
        text = opening + "".join(pieces)
        seconds = time.perf_counter() - started
        answer = {"prompt": prompt, "text": text, "seconds": round(seconds, 3)}
        print_json(answer)
        return 0
    for piece in chain(without_last_breaks(chain([opening], pieces)), ["\n"]):
        print_answer(piece)
    return 0
