"""`rwkv-peft demo`: the whole path on a small model, in minutes on a CPU."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_peft.assets import BASE_MODEL, DIALOGUES, HELD_OUT_DIALOGUES
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import Switch, TrainConfig
from rwkv_peft.printing import print_text
from rwkv_peft.terminal import drop_unwritten, keep_going

if TYPE_CHECKING:
    from rwkv_peft.models.base import RWKV

NUM_SHOWN = 3
MAX_TOKENS = 90


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Where the demo runs and writes."""

    proj_dir: str = ""
    """Folder of the results; the first free of demo, demo-2, demo-3 … if empty."""
    overwrite: Switch = 0
    """1 removes the files of the run that proj_dir holds, and no others."""
    accelerator: str = "cpu"
    """Device: cpu, auto, gpu, cuda, mps, xpu, musa, npu, or one of several as in cuda:1."""
    epoch_count: int = 3
    """Passes over the dialogues."""


def run(args: Sequence[str]) -> int:
    """Fine-tunes the bundled model on bundled dialogues; shows losses and answers of both."""
    options = parse(DemoOptions, args, command="demo")
    with keep_going():
        code = _run(options)
    drop_unwritten(sys.stdout)
    return code


def _run(options: DemoOptions) -> int:
    from rwkv_peft.api import load_model, train
    from rwkv_peft.device import resolve_device
    from rwkv_peft.training.folder import new_folder

    device = resolve_device(options.accelerator)
    print_text(
        f"A model of 8 million weights has read a dictionary, a manual, plays and a Bible\n"
        f"({BASE_MODEL}). It now learns from {_count(DIALOGUES)} dialogues to answer as the "
        "Devil's\n"
        "Dictionary does: a headword in capitals, its kind, a definition, a closing phrase.\n"
    )
    folder = nullcontext(options.proj_dir) if options.proj_dir else new_folder("demo")
    with folder as proj_dir:
        result = train(_train_config(options, str(proj_dir)))
    if result.signal or result.weights is None:
        return 128 + result.signal
    before = load_model(BASE_MODEL, device=device)
    after = load_model(result.weights, device=device)
    losses = [x.loss for x in result.evaluations if x.loss is not None]

    print_text("\nThe same questions, about words that were not in the dialogues:")
    for question in questions(NUM_SHOWN):
        print_text(f"\n{question}\n  before: {answer(before, question)}")
        print_text(f"  after:  {answer(after, question)}")
    print_text(
        f"\nLoss on {_count(HELD_OUT_DIALOGUES)} dialogues kept aside: {losses[0]:.2f} before, "
        f"{losses[-1]:.2f} after (nats per token).\n"
        f"The tuned model is {result.weights}; talk with it:\n"
        f"  rwkv-peft chat {result.weights} --temperature 0.5"
    )
    return 0


def _train_config(options: DemoOptions, proj_dir: str) -> TrainConfig:
    return TrainConfig(
        load_model=str(BASE_MODEL),
        data_file=str(DIALOGUES),
        val_file=str(HELD_OUT_DIALOGUES),
        proj_dir=proj_dir,
        overwrite=options.overwrite,
        peft="lora",
        peft_config={"r": 32, "lora_alpha": 64},
        epoch_count=options.epoch_count,
        ctx_len=512,
        lr_init=3e-3,
        lr_final=3e-4,
        accelerator=options.accelerator,
        precision="fp32",
        random_seed=0,
    )


def questions(count: int) -> list[str]:
    """The users' turns of the first dialogues kept aside."""
    with open(HELD_OUT_DIALOGUES, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, count)]
    return [text.partition("\n\n")[0].removeprefix("User: ") for text in texts]


def answer(model: "RWKV", question: str) -> str:
    """The model's likeliest answer to one question, on one line."""
    from rwkv_peft.generation.chat import Chat
    from rwkv_peft.generation.sampling import Sampling

    chat = Chat(model, Sampling(temperature=0))
    return " ".join("".join(chat.reply(question, MAX_TOKENS)).split())


def _count(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")
