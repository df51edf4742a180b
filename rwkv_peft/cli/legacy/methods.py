"""Old names of methods and their options, and of adapters to train further."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_peft.cli.arguments import Flags
from rwkv_peft.config import UNSAVED
from rwkv_peft.errors import ConfigError

ALIASES = {"bone": "miss", "disha": "miss", "full": "none"}
# switches that name a method, in the order of their rank if a line has several
SWITCHES = {"PISSA": "pissa", "LISA": "lisa", "state_tune": "state", "lora": "lora"}
CONFIGS = {
    f"{name}_config": ALIASES.get(name, name)
    for name in ("lora", "pissa", "lisa", "miss", "disha", "bone")
}
# flags of 2024, also the keys of the *_config flags and of older peft_configs -> the option
PREFIXED = ["lora_r", "lora_load", "lora_parts", "pissa_r", "pissa_load", "pissa_parts"]
PREFIXED += ["bone_r", "bone_load", "bone_mode"]
OPTIONS = {name: name.partition("_")[2] for name in PREFIXED}
OPTIONS |= {name: name for name in ("lora_alpha", "lora_dropout", "svd_niter", "pissa_init")}
OPTIONS |= {name: name for name in ("lisa_r", "lisa_k")}
# options that name their method where nothing else does
NAMING = {"lora_r": "lora", "lora_alpha": "lora", "lora_dropout": "lora"}
NAMING |= {"pissa_r": "pissa", "bone_r": "miss"}
# method -> options that it took for a new adapter, and for one to train further
NEW_OPTIONS = {
    "lora": ("r", "lora_alpha", "lora_dropout"),
    "pissa": ("r", "svd_niter"),
    "miss": ("r", "mode"),
}
FURTHER_OPTIONS = {"lora": ("lora_alpha", "lora_dropout"), "pissa": ("pissa_init",), "": UNSAVED}
# what may be trained beside a method, by substring of its name
PLAIN_PARTS = ("emb", "head", "time", "ln")
METHOD_FLAGS = {"peft", "peft_config", "load_adapter", "train_parts", "op", "fla", "emb"}
METHOD_FLAGS |= {*SWITCHES, *CONFIGS, *OPTIONS}


def translate_method(old: Mapping[str, str], notes: list[str]) -> Flags:
    """Today's flags peft, peft_config, load_adapter, train_parts and op for what a line asks.

    Args:
        old: the flags of the line that are in METHOD_FLAGS, old or new, with their words.
        notes: lines for flags that have no effect are added to it.
    Raises:
        ConfigError: a value cannot be read.
    """
    method, load = _find_method(old), old.get("load_adapter", "")
    options = _collect_options(old, method, notes)
    if options and not load and method in ("", "none", "auto"):
        notes += [f"--{n} has no effect: no method is named" for n in old if n in OPTIONS]
        options = {}
    text = old.get("peft_config", "")
    given = _read_json("peft_config", text or "{}", dict) if options else _read_mapping(text)
    today = {OPTIONS.get(key, key): value for key, value in given.items()}
    parts = [p for x in (options, today) for p in _split_words(x.pop("parts", ""))]
    trained = _read_json("train_parts", old.get("train_parts", "[]"), list)
    trained += [p for p in [*parts, *(["emb"] if "emb" in old else [])] if p in PLAIN_PARTS]
    trained += today.pop("train_parts", [])
    load = load or options.pop("load", "")
    if not load and (load := today.pop("load", "")):
        today = {name: today[name] for name in UNSAVED if name in today and _is_old_file(load)}
    today = _choose_options(method, load, options, parts) | today
    if load and method == "pissa":
        today.pop("lora_alpha", None)  # its scale is 1, whatever lora_alpha says
    if not today.get("pissa_init", True):
        del today["pissa_init"]
    if method == "miss" and (mode := today.pop("mode", "")) in ("bat", "mini"):
        # other modes, such as 'mode' and 'bone', were the default by another name
        today.setdefault("init_weights", mode)
    if options or today != given:
        text = json.dumps(today) if today else ""
    flags = {
        "peft": method,
        "load_adapter": load,
        "peft_config": text,
        "train_parts": json.dumps(list(dict.fromkeys(trained))) if trained else "",
        "op": old.get("op", "fla" if "fla" in old else ""),
    }
    return [(name, [value]) for name, value in flags.items() if value]


def _find_method(old: Mapping[str, str]) -> str:
    """The method that a line names in any way, by its name today; empty if it names none."""
    if "peft" in old:
        method = old["peft"].lower()
        return ALIASES.get(method, method)
    named = [method for switch, method in SWITCHES.items() if switch in old]
    configs = {CONFIGS[name] for name in old if name in CONFIGS}
    if len(configs) == 1:
        named += configs
    if not named and not old.get("load_adapter"):
        named += [method for name, method in NAMING.items() if name in old]
    return named[0] if named else ""


def _collect_options(old: Mapping[str, str], method: str, notes: list[str]) -> dict[str, Any]:
    """The options of flags of 2024 and of the method's *_config flag."""
    options: dict[str, Any] = {}
    for name, value in old.items():
        if name in OPTIONS:
            options[OPTIONS[name]] = value
        elif name in CONFIGS and CONFIGS[name] == method:
            options |= {
                OPTIONS.get(key, key): x for key, x in _read_json(name, value, dict).items()
            }
        elif name in CONFIGS:
            notes.append(f"--{name} has no effect: the method is {method or 'none'}")
    return options


def _choose_options(
    method: str, load: str, old: Mapping[str, Any], parts: list[str]
) -> dict[str, Any]:
    """Those of the old options that the method took, as those of Hugging Face peft."""
    names = NEW_OPTIONS.get(method, ("r",))
    if load:
        # a folder brings its own options
        names = FURTHER_OPTIONS.get(method, ()) if _is_old_file(load) else ()
    options = {name: old[name] for name in names if old.get(name) not in (None, "")}
    for name in options.keys() - {"pissa_init", "mode"}:
        options[name] = _number(name, options[name])
    for part, other in (("att", "ffn"), ("ffn", "att")):
        if not load and part in parts and other not in parts:
            options["target_modules"] = rf".*\.{part}\.(receptance|key|value|gate|output)"
    return options


def _is_old_file(load: str) -> bool:
    return load.endswith(".pth") or Path(load).is_file()


def _number(name: str, value: object) -> int | float:
    for read in (int, float):
        try:
            return read(str(value))
        except ValueError:
            continue
    raise ConfigError(f"{name}: got {value}, allowed is a number")


def _split_words(value: str | list[str]) -> list[str]:
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _read_mapping(text: str) -> dict[str, Any]:
    """A peft_config in JSON, or in YAML, as JSON is without its quotes; {} if it is neither."""
    import yaml

    for read in (json.loads, yaml.safe_load):
        try:
            value = read(text)
        except (json.JSONDecodeError, yaml.YAMLError):
            continue
        return value if isinstance(value, dict) else {}
    return {}


def _read_json(name: str, text: str, kind: type) -> Any:
    try:
        if isinstance(value := json.loads(text), kind):
            return value
    except json.JSONDecodeError:
        pass
    example = '["ln", "time"]' if kind is list else '{"r": 8}'
    raise ConfigError(
        f"--{name}: got {text or 'nothing'}, allowed is JSON in quotes such as '{example}'"
    )
