"""Arguments of the merge scripts of older versions."""

from collections.abc import Sequence

from rwkv_peft.cli.arguments import Translation, join_arguments, split_arguments
from rwkv_peft.errors import ConfigError

RENAMED = {
    "lora_checkpoint": "adapter",
    "peft_checkpoint": "adapter",
    "state_checkpoint": "adapter",
    "lora_init": "pissa_init",
}
DEAD = {"device": "merging needs no GPU", "use_gpu": "merging needs no GPU"}
TYPES = ("lora", "pissa", "disha", "bone", "miss", "state")
# the arguments that merge_lora.py and merge_pissa.py take by their places, and any by three
LORA_PLACES = ("lora_alpha", "base_model", "adapter", "output")
PISSA_PLACES = ("base_model", "pissa_init", "adapter", "output")
PLACES = ("base_model", "adapter", "output")
# what merge.py took where nothing was given; training's own default was 32
ALPHA = "16"


def translate_merge(arguments: Sequence[str]) -> Translation:
    """The arguments of an old merge script, in any of their forms, in today's flags.

    Raises:
        ConfigError: it asks for a merge of an unknown type.
    """
    switches = [a for a in arguments if a in ("--use-gpu", "--use_gpu")]
    positional, flags = split_arguments([a for a in arguments if a not in switches])
    if len(positional) in (3, 4):
        is_lora = positional[0].replace(".", "", 1).isdecimal()
        names = PLACES if len(positional) == 3 else LORA_PLACES if is_lora else PISSA_PLACES
        flags += [(name, [value]) for name, value in zip(names, positional, strict=True)]
        positional = []
    flags = [(RENAMED.get(name, name), words) for name, words in flags]
    dead = [*("use_gpu" for _ in switches), *(name for name, _ in flags if name in DEAD)]
    notes = [f"--{name} has no effect: {DEAD[name]}" for name in dead]
    given = {name: " ".join(words) for name, words in flags}
    if given.get("quant", "none").lower() not in ("", "none"):
        notes.append("--quant has no effect: an adapter notes how its base was stored in training")
    kind = given.get("type", "").lower()
    if kind and kind not in TYPES:
        raise ConfigError(f"--type {given['type']}: there are {', '.join(TYPES)}")
    if given.get("pissa_init", "none").lower() in ("", "none"):
        given.pop("pissa_init", None)
    if kind == "lora" and "lora_alpha" not in given and given.get("adapter", "").endswith(".pth"):
        given["lora_alpha"] = ALPHA
        notes.append(
            f"--lora_alpha {ALPHA}, as this script has it; if the training had another, give "
            "that one (32 unless it was set)"
        )
    if kind not in ("", "lora") and "lora_alpha" in given:
        del given["lora_alpha"]
        notes.append(f"--lora_alpha has no effect: {kind} has a scale of its own")
    kept = {n: x for n, x in given.items() if n not in (*DEAD, "quant", "type")}
    today = [(name, [value] if value else []) for name, value in kept.items()]
    return Translation(join_arguments(positional, today), notes, {})
