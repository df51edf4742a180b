"""Lines and YAML files of training written for older versions, in today's flags."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_peft.cli.arguments import Flags, Translation, join_arguments, split_arguments
from rwkv_peft.cli.legacy.methods import METHOD_FLAGS, SWITCHES, translate_method
from rwkv_peft.errors import ConfigError
from rwkv_peft.yaml_file import read_yaml

if TYPE_CHECKING:
    from rwkv_peft.models.config import ModelConfig

# flags that no version of the program ever acted on, or whose work is done without them, and why
DEAD = {
    **dict.fromkeys(
        ("pre_ffn", "head_qk", "tiny_att_dim", "tiny_att_layer", "my_pos_emb"),
        "RWKV-5, 6 and 7 have no such part",
    ),
    **dict.fromkeys(
        ("my_ffn_shift", "my_att_shift", "my_sample_len", "my_random_steps", "avg_loss"),
        "it was never read",
    ),
    "dropout": "it was never read; LoRA has --peft_config '{\"lora_dropout\": 0.05}'",
    **dict.fromkeys(
        ("my_pile_version", "my_pile_stage", "my_pile_shift", "my_pile_edecay", "magic_prime"),
        "the order of the data is a permutation drawn from --random_seed",
    ),
    "my_qa_mask": "it looked for tokens of another vocabulary; use --loss_mask qa",
    "ds_bucket_mb": "it was a buffer of DeepSpeed's",
    "load_partial": "a model file must be complete; a new state is made by --peft state",
    "train_stage": "a new model is made by rwkv-peft init, and trained by --peft none",
    "head_chunk": "the head always runs in chunks",
    "kernel": "--op names the backend of the recurrence",
    "fused_kernel": "fused code is used wherever it is exact",
    "persistent_workers": "the workers of --num_workers always live as long as the run",
    "prefetch_factor": "each thread of --num_workers prepares two batches ahead",
    "enable_progress_bar": "progress is a bar on a terminal and plain lines elsewhere",
    "enable_checkpointing": "a run always saves",
}
RENAMED = {"head_size": "head_size_a", "optim": "optimizer"}
# (flag, value) that asks for nothing, such as an old default
NEUTRAL = {("quant", "none"), ("quant", ""), ("wandb", ""), ("load_adapter", "")}
NEUTRAL |= {("my_exit", "99999999"), ("my_exit_tokens", "0")}
NEUTRAL |= {(name, "false") for name in (*SWITCHES, "fla", "emb")}
REPLACED = {
    ("strategy", "ddp_find_unused_parameters_true"): "ddp",
    ("strategy", "ddp_find_unused_parameters_false"): "ddp",
    ("optimizer", "none"): "adamw",
    **{("optimizer", n): "adamw" for n in ("adam", "adamw_torch", "adamw_torch_fused")},
    **{("optimizer", n): "adamw8bit" for n in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")},
    ("lr_schedule", "cosine"): "cos",
    **{("precision", n): "bf16" for n in ("bfloat16", "bf16-mixed", "bf16-true")},
    **{("precision", n): "fp16" for n in ("float16", "16", "16-mixed", "16-true", "half")},
    **{("precision", n): "fp32" for n in ("float32", "32", "32-true", "float")},
    ("train_type", "states"): "state",
    ("quant", "4bit"): "nf4",
    ("quant", "8bit"): "int8",
    ("warmup_steps", "-1"): "0",
    ("epoch_save", "0"): "99999999",
}
# flags with one useful value
FIXED = {"head_size_divisor": "8"}
# flags that say what the model's file says too -> the field of ModelConfig they must agree with
MODEL_FLAGS = {n: n for n in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn")}
MODEL_FLAGS |= {"head_size_a": "head_size", "my_testing": "version"}


def translate_train(arguments: Sequence[str]) -> Translation:
    """A line of training in today's flags; today's own flags pass through unchanged.

    Old flags, and old keys in the files of --config, are translated if they have a meaning; the
    others are left out with a note each.

    Raises:
        ConfigError: a value cannot be read.
    """
    positional, flags = split_arguments(arguments)
    notes: list[str] = []
    said: dict[str, str] = {}
    for name, words in flags:
        if name == "config" and len(words) == 1:
            words[0] = _translate_file(words[0], notes, said)
    today = join_arguments(positional, _translate_flags(flags, notes, said))
    return Translation(today, notes, {n: x for n, x in said.items() if x not in ("", "0")})


def require_agreement(model_flags: Mapping[str, str], config: "ModelConfig", file: str) -> None:
    """Compares what a line says of the model with the model config that its file has.

    Raises:
        ConfigError: they differ; the message has both values.
    """
    for flag, word in model_flags.items():
        found = getattr(config, MODEL_FLAGS[flag])
        said = word if isinstance(found, str) else _whole(model_flags, flag)
        if said != found:
            raise ConfigError(
                f"--{flag} {said} contradicts {file}, where it is {found}: leave the flag out "
                "(it is read from the file) or give another file"
            )


def _translate_file(path: str, notes: list[str], said: dict[str, str]) -> str:
    """The settings of a YAML file in today's keys, as JSON; the path if they cannot be read."""
    import jsonargparse
    import yaml

    if Path(path).is_file():
        read_yaml(path)  # raises for what the loader below should not meet
    try:
        settings = jsonargparse.get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return path  # of which the parser says what is wrong
    if not isinstance(settings, dict):
        return path
    words = {
        str(name): value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str)
        for name, value in settings.items()
    }
    flags = _translate_flags([(name, [word]) for name, word in words.items()], notes, said)
    today: dict[str, Any] = {name: " ".join(found) for name, found in flags}
    # what did not change keeps its type
    kept = {name: settings[name] for name, word in today.items() if words.get(name) == word}
    return json.dumps(today | kept, ensure_ascii=False, default=str)


def _translate_flags(flags: Flags, notes: list[str], said: dict[str, str]) -> Flags:
    """Old and new flags in today's names; those of MODEL_FLAGS go into `said`."""
    flags = [(RENAMED.get(name, name), words) for name, words in flags]
    flags = [(n, [REPLACED.get((n, word), word) for word in words]) for n, words in flags]
    notes += [f"--{name} has no effect: {DEAD[name]}" for name in dict(flags) if name in DEAD]
    flags = [f for f in flags if f[0] not in DEAD and (f[0], " ".join(f[1])) not in NEUTRAL]
    for name, words in flags:
        given = " ".join(words)
        if name in FIXED and given != FIXED[name]:
            raise ConfigError(f"--{name}: got {given or 'nothing'}, allowed is {FIXED[name]}")
        if name in MODEL_FLAGS:
            said[name] = given
    flags = _without_missing_logger(_without_rank(flags), notes)
    method = {name: " ".join(words) for name, words in flags if name in METHOD_FLAGS}
    gone = {*METHOD_FLAGS, *MODEL_FLAGS, *FIXED}
    flags = [f for f in flags if f[0] not in gone] + translate_method(method, notes)
    return _without_exits(flags, notes)


def _without_rank(flags: Flags) -> Flags:
    """The flags without `local_rank`, which DeepSpeed's launcher adds beside LOCAL_RANK."""
    there = os.environ.get("LOCAL_RANK", "0")
    for said in (" ".join(words) for name, words in flags if name == "local_rank"):
        if said != there:
            raise ConfigError(
                f"--local_rank {said} contradicts LOCAL_RANK={there}: leave the flag out, which a "
                "launcher sets for each process"
            )
    return [flag for flag in flags if flag[0] != "local_rank"]


def _without_missing_logger(flags: Flags, notes: list[str]) -> Flags:
    """The flags without `wandb`, which old lines have, where it is not installed."""
    from rwkv_peft.ops.dispatch import is_installed

    given = dict(flags)
    if "wandb" not in given or "report_to" in given or is_installed("wandb"):
        return flags
    notes.append(
        f"--wandb {' '.join(given['wandb'])} has no effect: wandb is not installed "
        "(pip install 'rwkv-peft[wandb]'); every step is in loss_data.jsonl"
    )
    return [flag for flag in flags if flag[0] != "wandb"]


def _without_exits(flags: Flags, notes: list[str]) -> Flags:
    """The flags with an end set by `my_exit` or `my_exit_tokens` in place as epochs."""
    given = {name: " ".join(words) for name, words in flags}
    if not {"my_exit", "my_exit_tokens"} & set(given):
        return flags
    epochs = [_whole(given, "epoch_count")] if "epoch_count" in given else []
    if "my_exit" in given:
        begin = _whole(given, "epoch_begin") if "epoch_begin" in given else 0
        epochs.append(max(1, _whole(given, "my_exit") - begin))
    if "my_exit_tokens" in given:
        sizes = ("ctx_len", "micro_bsz", "epoch_steps")
        if not set(sizes) <= set(given):
            raise ConfigError(
                "--my_exit_tokens needs --ctx_len, --micro_bsz and --epoch_steps to say how many "
                "epochs it means: give them, or --epoch_count alone"
            )
        per_epoch = math.prod(_whole(given, name) for name in sizes)
        epochs.append(-(-_whole(given, "my_exit_tokens") // max(1, per_epoch)))
    count = min(epochs)
    notes.append(f"the run ends early, as --my_exit or --my_exit_tokens say: --epoch_count {count}")
    dropped = ("my_exit", "my_exit_tokens", "epoch_count")
    return [f for f in flags if f[0] not in dropped] + [("epoch_count", [str(count)])]


def _whole(given: Mapping[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError as error:
        raise ConfigError(f"--{name}: got {given[name]}, allowed is a whole number") from error
