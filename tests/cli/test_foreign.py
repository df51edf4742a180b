"""Flags of other programs are answered with those of this one."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_peft.cli.foreign import answer_foreign, read_table
from rwkv_peft.cli.main import COMMANDS
from rwkv_peft.cli.parse import parse
from rwkv_peft.errors import ConfigError

Cli = Callable[..., SimpleNamespace]
OPTIONS = {
    name: getattr(import_module(f"rwkv_peft.cli.{name}"), f"{name.capitalize()}Options")
    for name in COMMANDS
}
FLAGS = {command: {f.name for f in fields(options)} for command, options in OPTIONS.items()}

# command -> flag of another program -> a flag or a word of the answer
ANSWERS = {
    "train": {
        "epochs": "--epoch_count",
        "num_train_epochs": "--epoch_count",
        "batch_size": "--micro_bsz",
        "per_device_train_batch_size": "--micro_bsz",
        "gradient_accumulation_steps": "--accumulate_grad_batches",
        "lora_rank": "--peft_config",
        "rank": "--peft_config",
        "target_modules": "target_modules",
        "output": "--proj_dir",
        "output-dir": "--proj_dir",
        "learning_rate": "--lr_init",
        "lr": "--lr_init",
        "lr_scheduler_type": "--lr_schedule",
        "warmup_ratio": "--warmup_steps",
        "max_steps": "--epoch_steps",
        "eval_file": "--val_file",
        "val_size": "--val_split",
        "model": "--load_model",
        "model_name_or_path": "--load_model",
        "m": "--load_model",
        "dataset": "--data_file",
        "max_seq_length": "--ctx_len",
        "seed": "--random_seed",
        "bf16": "--precision",
        "device": "--accelerator",
        "gradient_checkpointing": "--grad_cp",
        "load_in_4bit": "--quant",
        "train_on_inputs": "--loss_mask",
        "chat_template": "--template",
        "wandb_project": "--report_to",
        "save_steps": "--save_every_steps",
        "resume_from_checkpoint": "--resume",
        "deepspeed": "--strategy",
        "flash_attn": "no attention",
        "tokenizer": "built in",
        "dpo": "is not built: train on the answers",
        "neftune_noise_alpha": "not built",
        "push_to_hub": "nothing is sent",
    },
    "generate": {
        "model": "--load_model",
        "max_new_tokens": "--max_tokens",
        "top_k": "--top_p",
        "repetition_penalty": "--presence",
        "lora": "--adapter",
        "state_file": "--state",
        "quantize": "leave it out",
        "input": "--user",
    },
    "chat": {"temp": "--temperature", "max_length": "--max_tokens", "lora_path": "--adapter"},
    "export": {"model": "the first argument", "batch_size": "rwkv-peft train has"},
    "inspect": {"model": "the first argument", "max_steps": "rwkv-peft train has"},
    "init": {"lr_init": "rwkv-peft train has", "lora_r": "rwkv-peft train has"},
    "doctor": {"dataset": "rwkv-peft train has"},
    "demo": {"epochs": "--epoch_count", "report_to": "rwkv-peft train has"},
    "merge": {"model": "--base_model", "lora_path": "--adapter", "out": "--output"},
    "data": {"dataset": "--data_file", "max_length": "--ctx_len", "prompt_style": "--template"},
    "eval": {"model": "--load_model", "eval_data": "--data_file", "dtype": "--precision"},
}


@pytest.mark.parametrize("command", ANSWERS)
def test_a_flag_of_another_program_is_answered_by_meaning(command: str, cli: Cli) -> None:
    for number, (name, answer) in enumerate(ANSWERS[command].items()):
        flag = f"-{name}" if len(name) == 1 else f"--{name}"
        done = cli(command, *([flag, "3"] if number % 2 else [f"{flag}=3"]))
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        given = flag.replace("output-dir", "output_dir")
        assert done.err.startswith(f"error: unknown flag {given}: ") and answer in done.err


def test_several_are_answered_at_once_and_keys_of_a_file_too(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", "--epochs", 3, "--lr", "1e-4", "--micro_bzs", 2)
    for answer in ("--epoch_count", "--lr_init", "did you mean --micro_bsz?"):
        assert answer in done.err
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\n")
    done = cli("train", "--config", tmp_path / "c.yaml")
    assert done.err.startswith("error: unknown key learning_rate: ") and "--lr_init" in done.err


# named in a plan of what users of other programs type
USUAL = "epochs batch_size lora_rank lora_r output learning_rate lr max_steps eval_file report_to"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [*USUAL.split(), "model", "dataset"])
def test_every_command_answers_the_usual_flags_by_meaning(
    command: str, name: str, cli: Cli
) -> None:
    if name in FLAGS[command] or (command, name) == ("train", "lora_r"):
        return
    for words in ([f"--{name}", "3"], [f"--{name}=3"]):
        done = cli(command, *words)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert done.err.startswith(f"error: unknown flag --{name}: ")
        # neither a guess by its letters nor nothing
        assert "did you mean" not in done.err and "see --help" not in done.err, done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_flag_is_answered_with_the_one_that_was_meant(command: str) -> None:
    for name in FLAGS[command]:
        if len(name) < 6:
            continue
        for wrong in (name[1:], name[:3] + name[4:], name[:2] + "zz" + name[2:], name.upper()):
            if wrong in FLAGS[command] or answer_foreign(wrong, FLAGS[command]):
                continue
            with pytest.raises(ConfigError, match=f"did you mean --{name}\\?"):
                parse(OPTIONS[command], [f"--{wrong}", "1"], command=command)


def test_a_flag_is_not_taken_for_the_beginning_of_another(cli: Cli) -> None:
    # as argparse does by itself: --device is not --devices
    assert "--accelerator" in cli("train", "--device", "cpu").err
    assert "unknown flag --save_every: checkpoints are" in cli("train", "--save_every", 5).err


def test_the_table_holds_each_name_once_and_names_flags_that_exist() -> None:
    table = list(read_table())
    assert [name for name, count in Counter(n for n, _ in table).items() if count > 1] == []
    known = set().union(*FLAGS.values())
    # refused by name; not of one command
    known |= {"debug", "quant"}
    for name, answers in table:
        assert re.fullmatch(r"[a-z0-9_]+", name) and answers, name
        for answer in answers:
            unknown = set(re.findall(r"--(\w+)", answer)) - known
            assert not unknown, f"{name}: {answer}"
        # what it says holds for at least one command that lacks the flag
        held = [c for c, own in FLAGS.items() if name not in own and answer_foreign(name, own)]
        assert held, name
