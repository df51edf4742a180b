"""Which strategy suits a run on several devices, and what cannot be shared by it."""

from collections.abc import Mapping
from typing import Any

from rwkv_peft.device import dtype_of
from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.strategy import require_strategy
from rwkv_peft.training.memory import weigh_base
from rwkv_peft.training.optimizers import OPTIMIZERS
from rwkv_peft.training.settings import Facts

# of what is free on a device, that a base may take and leave room to train
SHARE_OF_BASE = 0.6


def suit_strategy(values: Mapping[str, Any], facts: Facts, *, is_infctx: bool) -> tuple[str, str]:
    """The strategy for what fits a device, and why.

    Args:
        values: of settings, by name.
        is_infctx: rows go through the model in chunks.
    """
    size = dtype_of(values["precision"]).itemsize
    weights = weigh_base(facts.model_config, facts.num_weights, size, values["quant"])
    free, says = facts.memory, f"the model takes {weights / 2**30:.1f} GiB of each device"
    if free is None or weights <= SHARE_OF_BASE * free:
        return "ddp", says
    says += f" and leaves too little of {free / 2**30:.1f} GiB"
    if values["peft"] == "none" or is_infctx:
        return "ddp", f"{says}, but fsdp serves frozen blocks and whole rows alone so far"
    return "fsdp", says


def require_shareable(values: Mapping[str, Any], count: int, *, is_infctx: bool) -> None:
    """Raises ConfigError if so many devices cannot share a run by its strategy."""
    require_strategy(values["strategy"], count)
    if values["strategy"] != "fsdp":
        return
    refused = {
        "--train_type infctx and --bptt_chunks": is_infctx,
        "--val_prompts": values["val_prompts"],
        "--compile 1": values["compile"] == 1,
        "--cuda_graph 1": values["cuda_graph"] == 1,
    }
    if found := [name for name, is_asked in refused.items() if is_asked]:
        raise ConfigError(
            f"--strategy fsdp shares blocks in whole rows, and not with {found[0]} so far: use "
            "--strategy ddp, or leave that out"
        )
    alone = [name for name, maker in OPTIMIZERS.items() if maker.is_elementwise]
    if values["peft"] == "none" and values["optimizer"] not in alone:
        raise ConfigError(
            f"--strategy fsdp gives each device a part of every weight, and --optimizer "
            f"{values['optimizer']} looks at a weight as a whole: use {' or '.join(alone)}, or "
            "--strategy ddp"
        )
