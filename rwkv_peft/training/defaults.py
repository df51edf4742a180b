"""Values that suit most, by method and width; docs/training.md has the evidence."""

import math
from collections.abc import Mapping
from typing import Any

from rwkv_peft.device import dtype_of
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.training.memory import fits
from rwkv_peft.training.settings import Facts

# longest rows chosen without being asked, the first that fits: files of 2026 were trained on as
# many tokens and more; the last is taken however little memory there is
CHOSEN_CTX = (16384, 8192, 4096)
# options of a method for which none are given
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"r": 32, "lora_alpha": 32},
    "miss": {"r": 64},
}
# of LoRA at a width of 2048; the best falls with the root of the width, whatever the rank
ADAPTER_RATE, ADAPTER_WIDTH = 2e-4, 2048
PISSA_SHARE = 1 / 3
FULL_RATE, FULL_WIDTH = 3e-5, 768
# the largest that helped on an official file, see docs/training.md
STATE_RATE = 1e-3
# rates of optimizers whose steps are of another size than AdamW's, whatever is trained
OTHER_RATES = {
    "sgd": (0.1, "SGD's steps are as small as the gradient"),
    "adafactor": (1e-2, "Adafactor's rate is a share of each tensor's size"),
}
# Lion moves every number by the whole rate
LION_SHARE = 0.2
# steps over which the rate rises: three in a hundred, but some, and no more than a tenth of all
WARMUP_SHARE, WARMUP_LEAST = 0.03, 10


def add_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method for which the user gave none, with its rank and scale."""
    return {**OPTIONS.get(method, {}), **options}


def choose_rate(values: Mapping[str, Any], model_config: ModelConfig) -> tuple[float, str]:
    """The learning rate at the start, and why."""
    method, width = values["peft"], model_config.n_embd
    if method == "none":
        lr, reason = FULL_RATE * math.sqrt(FULL_WIDTH / width), "full tuning at this width"
    elif method == "state":
        lr, reason = STATE_RATE, "what helped a state of an official file; small models bear more"
    elif method in OPTIONS:
        lr, reason = ADAPTER_RATE * math.sqrt(ADAPTER_WIDTH / width), "adapters at this width"
        if str(values["peft_config"].get("init_lora_weights", "")).startswith("pissa"):
            lr, reason = lr * PISSA_SHARE, "a third of LoRA's, as PiSSA moves the largest parts"
    else:
        lr, reason = ADAPTER_RATE, "usual for adapters"
    lr, reason = OTHER_RATES.get(values["optimizer"], (lr, reason))
    if values["optimizer"] == "lion":
        lr, reason = lr * LION_SHARE, f"{reason}, a fifth for Lion"
    return float(f"{lr:.2g}"), reason


def choose_last_rate(values: Mapping[str, Any]) -> tuple[float, str]:
    """The learning rate at the end, and why."""
    share, name = (100, "hundredth") if values["peft"] == "state" else (10, "tenth")
    return float(f"{values['lr_init'] / share:.6g}"), f"a {name} of lr_init"


def choose_warmup(steps: int) -> tuple[int, str]:
    """Steps over which the rate rises, and why."""
    wanted = max(WARMUP_LEAST, round(WARMUP_SHARE * steps))
    return min(wanted, steps // 10), "3 % of the steps, at least 10, at most a tenth"


def longest_chosen(values: Mapping[str, Any], facts: Facts) -> int:
    """The longest row that is chosen unasked: as long as official files know and memory allows."""
    for length in CHOSEN_CTX[:-1]:
        if fits(
            facts,
            dtype_of(values["precision"]),
            op=values["op"],
            positions=length * (values["micro_bsz"] or 1),
            trains_all=values["peft"] == "none",
            # inputs of blocks leave the device where that is asked for
            grad_cp=1 if values["grad_cp"] is None else values["grad_cp"],
            quant=values["quant"],
            has_head=bool(values["quant_head"]),
            optimizer=values["optimizer"],
            optimizer_cpu=bool(values["optimizer_cpu"]),
        ):
            return length
    return CHOSEN_CTX[-1]
