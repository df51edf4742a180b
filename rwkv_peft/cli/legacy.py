"""Command lines written for older versions of RWKV-PEFT, in today's flags.

This file knows the old names and nothing else: it turns one argument list into another.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rwkv_peft.errors import ConfigError

# flags that no version of the program ever acted on, or whose work is done without them, and why
DEAD = {
    **dict.fromkeys(
        ("pre_ffn", "head_qk", "tiny_att_dim", "tiny_att_layer", "my_pos_emb"),
        "RWKV-5, 6 and 7 have no such part",
    ),
    **dict.fromkeys(
        ("my_ffn_shift", "my_att_shift", "dropout", "my_sample_len", "my_random_steps", "avg_loss"),
        "it was never read",
    ),
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
    "chunk_ctx": "--train_type infctx is not built yet",
}
RENAMED = {"head_size": "head_size_a", "optim": "optimizer"}
# (flag, value) of old defaults that ask for nothing
NEUTRAL = {("quant", "none"), ("quant", ""), ("wandb", ""), ("load_adapter", "")}
NEUTRAL |= {("my_exit", "99999999"), ("my_exit_tokens", "0")}
REPLACED = {
    ("strategy", "ddp_find_unused_parameters_true"): "ddp",
    ("strategy", "ddp_find_unused_parameters_false"): "ddp",
    ("optimizer", "none"): "adamw",
    ("optimizer", "adam"): "adamw",
    ("train_type", "states"): "state",
    ("warmup_steps", "-1"): "0",
    ("epoch_save", "0"): "99999999",
}
# flags of features that are not built yet
UNBUILT = {
    "quant": "quantised weights are",
    "wandb": "logging to wandb is",
}
# flags whose words are a list
LISTS = ("train_parts", "sft_field")
# in the order of their rank, if a line has several
SWITCHES = {"PISSA": "pissa", "LISA": "lisa", "state_tune": "state", "lora": "lora"}
CONFIGS = {
    "lora_config": "lora",
    "pissa_config": "pissa",
    "lisa_config": "lisa",
    "miss_config": "miss",
    "disha_config": "miss",
    "bone_config": "miss",
}
ALIASES = {"bone": "miss", "disha": "miss"}
# flags of 2024 and keys of the *_config flags -> one name for each option
OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_load": "load",
    "lora_parts": "parts",
    "pissa_r": "r",
    "svd_niter": "svd_niter",
    "pissa_load": "load",
    "pissa_init": "init",
    "pissa_parts": "parts",
    "bone_r": "r",
    "bone_mode": "mode",
    "bone_load": "load",
    "lisa_r": "lisa_r",
    "lisa_k": "lisa_k",
}
# options that an adapter file of old does not hold -> their names today
UNSAVED = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "init": "pissa_init"}
# what may be trained beside a method, by substring of its name
PLAIN_PARTS = ("emb", "head", "time", "ln")
METHOD_FLAGS = {"peft", "peft_config", "load_adapter", "train_parts", "op", "fla", "emb"}
METHOD_FLAGS |= {*SWITCHES, *CONFIGS, *OPTIONS}

# flags of the merge scripts -> today's, and those that have no effect
MERGE_FLAGS = {
    "lora_checkpoint": "adapter",
    "peft_checkpoint": "adapter",
    "state_checkpoint": "adapter",
    "lora_init": "pissa_init",
}
MERGE_DEAD = {"device": "merging needs no GPU", "use_gpu": "merging needs no GPU"}
MERGE_TYPES = ("lora", "pissa", "disha", "bone", "miss", "state")
# the arguments that merge_lora.py and merge_pissa.py take by their places, and any by three
MERGE_LORA = ("lora_alpha", "base_model", "adapter", "output")
MERGE_PISSA = ("base_model", "pissa_init", "adapter", "output")
MERGE_ANY = ("base_model", "adapter", "output")
# what merge.py took where nothing was given; training's own default was 32
MERGE_ALPHA = "16"

Flags = list[tuple[str, list[str]]]


class Translation(NamedTuple):
    """An argument list in today's flags, and a line for each old flag without an effect."""

    arguments: list[str]
    notes: list[str]


def translate(arguments: Sequence[str]) -> Translation:
    """The same wishes in today's flags; what is of today passes through.

    Old flags with a meaning are translated, dead ones are left out with a note each. JSON that a
    shell has split at its spaces is joined again.

    Raises:
        ConfigError: a flag asks for a feature that is not built, or its value cannot be read.
    """
    positional, flags = _split(arguments)
    notes = [f"--{name} has no effect: {DEAD[name]}" for name in dict(flags) if name in DEAD]
    flags = [f for f in flags if f[0] not in DEAD and (f[0], " ".join(f[1])) not in NEUTRAL]
    old = {name: " ".join(words) for name, words in flags if name in METHOD_FLAGS}
    flags = [f for f in flags if f[0] not in METHOD_FLAGS] + _method_flags(old, notes)
    flags = _without_exits(flags, notes)
    for name, values in flags:
        if name in UNBUILT:
            given = " ".join([f"--{name}", *values])
            raise ConfigError(f"{given}: {UNBUILT[name]} not built yet: leave it out")
    words = [word for name, values in flags for word in (f"--{name}", *values)]
    return Translation([*positional, *words], notes)


def translate_merge(arguments: Sequence[str]) -> Translation:
    """The arguments of an old merge script, in any of their forms, in today's flags.

    Raises:
        ConfigError: it asks for a merge into quantised weights, or of an unknown type.
    """
    switches = [a for a in arguments if a in ("--use-gpu", "--use_gpu")]
    positional, flags = _split([a for a in arguments if a not in switches])
    if len(positional) in (3, 4):
        is_lora = positional[0].replace(".", "", 1).isdecimal()
        names = MERGE_ANY if len(positional) == 3 else MERGE_LORA if is_lora else MERGE_PISSA
        flags += [(name, [value]) for name, value in zip(names, positional, strict=True)]
        positional = []
    flags = [(MERGE_FLAGS.get(name, name), words) for name, words in flags]
    dead = [*("use_gpu" for _ in switches), *(name for name, _ in flags if name in MERGE_DEAD)]
    notes = [f"--{name} has no effect: {MERGE_DEAD[name]}" for name in dead]
    given = {name: " ".join(words) for name, words in flags}
    if given.get("quant", "none").lower() not in ("", "none"):
        raise ConfigError(
            f"--quant {given['quant']}: a merge into weights as they were quantised is not built "
            "yet: leave it out, which adds the adapter to the weights as they are in the file"
        )
    kind = given.get("type", "").lower()
    if kind and kind not in MERGE_TYPES:
        raise ConfigError(f"--type {given['type']}: there are {', '.join(MERGE_TYPES)}")
    if given.get("pissa_init", "none").lower() in ("", "none"):
        given.pop("pissa_init", None)
    if kind == "lora" and "lora_alpha" not in given and given.get("adapter", "").endswith(".pth"):
        given["lora_alpha"] = MERGE_ALPHA
        notes.append(
            f"--lora_alpha {MERGE_ALPHA}, as this script has it; if the training had another, give "
            "that one (32 unless it was set)"
        )
    if kind not in ("", "lora") and "lora_alpha" in given:
        del given["lora_alpha"]
        notes.append(f"--lora_alpha has no effect: {kind} has a scale of its own")
    kept = [(n, x) for n, x in given.items() if n not in (*MERGE_DEAD, "quant", "type")]
    words = [word for name, value in kept for word in (f"--{name}", value) if word]
    return Translation([*positional, *words], notes)


def _split(arguments: Sequence[str]) -> tuple[list[str], Flags]:
    """The arguments before the first flag, and each flag with the words behind it."""
    positional: list[str] = []
    flags: Flags = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            flags.append((RENAMED.get(name, name), [value] if equals else []))
        elif flags:
            flags[-1][1].append(argument)
        else:
            positional.append(argument)
    return positional, [(name, _joined(name, words)) for name, words in flags]


def _joined(name: str, words: list[str]) -> list[str]:
    if name in LISTS:
        bare = [word.strip("[]\"' ") for word in " ".join(words).replace(",", " ").split()]
        return [json.dumps([word for word in bare if word], ensure_ascii=False)]
    if words and words[0].startswith("{"):
        return [" ".join(words)]
    return [REPLACED.get((name, word), word) for word in words]


def _method_flags(old: dict[str, str], notes: list[str]) -> Flags:
    """peft, peft_config, load_adapter, train_parts and op, as the flags of all ages say."""
    method = _method(old)
    options: dict[str, Any] = {}
    for name, value in old.items():
        if name in OPTIONS:
            options[OPTIONS[name]] = value
        elif name in CONFIGS and CONFIGS[name] == ALIASES.get(method, method):
            options |= {OPTIONS.get(k, k): v for k, v in _json(name, value).items()}
        elif name in CONFIGS:
            notes.append(f"--{name} has no effect: the method is {method or 'none'}")
    load = old.get("load_adapter", "")
    if options and not load and method in ("", "none", "auto"):
        notes += [f"--{n} has no effect: no method is named" for n in old if n in OPTIONS]
        options = {}
    parts = str(options.pop("parts", "")).replace(",", " ").split()
    load = load or options.pop("load", "")
    given = {"peft": method, "load_adapter": load}
    options = _unsaved(load, method, options) if load else _peft_options(method, options, parts)
    given["peft_config"] = old.get("peft_config", "")
    if options:
        explicit = _json("peft_config", given["peft_config"] or "{}")
        given["peft_config"] = json.dumps(options | explicit)
    trained = [p for p in [*parts, *(["emb"] if "emb" in old else [])] if p in PLAIN_PARTS]
    trained = [*json.loads(old.get("train_parts", "[]")), *trained]
    if trained:
        given["train_parts"] = json.dumps(list(dict.fromkeys(trained)))
    given["op"] = old.get("op", "fla" if "fla" in old else "")
    return [(name, [value]) for name, value in given.items() if value]


def _method(old: dict[str, str]) -> str:
    """The method that a line names, in any way; empty if it names none."""
    if "peft" in old:
        return old["peft"].lower()
    named = [method for switch, method in SWITCHES.items() if switch in old]
    configs = {CONFIGS[name] for name in old if name in CONFIGS}
    if len(configs) == 1:
        named += configs
    return named[0] if named else ""


def _peft_options(method: str, old: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """Options of an old method as those of Hugging Face peft."""
    method = ALIASES.get(method, method)
    options: dict[str, Any] = {"r": int(old["r"])} if "r" in old else {}
    if method == "lora":
        options |= {"lora_alpha": int(old["lora_alpha"])} if "lora_alpha" in old else {}
        options |= {"lora_dropout": float(old["lora_dropout"])} if "lora_dropout" in old else {}
    if method == "pissa" and options:
        # its scale was 1 whatever lora_alpha said, and it had no dropout
        options["lora_alpha"] = options["r"]
    if method == "pissa" and "svd_niter" in old:
        options["init_lora_weights"] = f"pissa_niter_{int(old['svd_niter'])}"
    if method == "miss" and old.get("mode") in ("bat", "mini"):
        options["init_weights"] = old["mode"]
    for part, other in (("att", "ffn"), ("ffn", "att")):
        if part in parts and other not in parts:
            options["target_modules"] = rf".*\.{part}\.(receptance|key|value|gate|output)"
    return options


def _unsaved(load: str, method: str, old: dict[str, Any]) -> dict[str, Any]:
    """Options of an adapter that its file does not hold; a folder brings its own."""
    if not load.endswith(".pth"):
        return {}
    names = {"pissa": ("init",), "lora": ("lora_alpha", "lora_dropout"), "": (*UNSAVED,)}
    found = {UNSAVED[n]: old[n] for n in names.get(method, ()) if old.get(n) not in (None, "")}
    try:
        return {n: x if n == "pissa_init" else json.loads(str(x)) for n, x in found.items()}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{', '.join(found)}: got {error.doc}, allowed is a number") from error


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


def _whole(given: dict[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError as error:
        raise ConfigError(f"--{name}: got {given[name]}, allowed is a whole number") from error


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(
            f"--{name}: got {text or 'nothing'}, allowed is JSON in quotes such as '{{\"r\": 8}}'"
        )
    return value
