"""Which strategy suits a run on several devices, and what cannot be shared by it."""

from collections.abc import Mapping
from typing import Any

from rwkv_peft.device import dtype_of
from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.strategy import require_strategy, stage_of
from rwkv_peft.training.memory import bytes_of_training, weigh_base
from rwkv_peft.training.optimizers import OPTIMIZERS
from rwkv_peft.training.settings import Facts

# of what is free on a device, that a base, and what trains it, may take and leave room to compute
SHARE_OF_BASE = 0.6


def suit_strategy(values: Mapping[str, Any], facts: Facts) -> tuple[str, str]:
    """The strategy for what fits a device, and why.

    Args:
        values: of settings, by name.
    """
    size = dtype_of(values["precision"]).itemsize
    held = weigh_base(facts.model_config, facts.num_weights, size, values["quant"])
    says = f"the model takes {held / 2**30:.1f} GiB of each device"
    if values["peft"] == "none":
        held += facts.num_weights * bytes_of_training(size)
        says = f"the model and what trains it take {held / 2**30:.1f} GiB of each device"
    free = facts.memory
    if free is None or held <= SHARE_OF_BASE * free:
        return "ddp", says
    says += f" and leaves too little of {free / 2**30:.1f} GiB"
    return "fsdp", says


def require_shareable(values: Mapping[str, Any], count: int, num_states: int = 0) -> None:
    """Raises ConfigError if so many devices cannot share a run by its strategy.

    Args:
        values: of settings, by name.
        num_states: that the data names.
    """
    name = values["strategy"]
    require_strategy(name, count)
    refused = _refused_by_deepspeed(values, stage_of(name), num_states)
    if name == "fsdp":
        refused = {"--cuda_graph 1": values["cuda_graph"] == 1}
    if found := [option for option, is_asked in refused.items() if is_asked]:
        raise ConfigError(
            f"--strategy {name} does not go with {found[0]} so far: use --strategy ddp, or leave "
            "that out"
        )
    alone = [optimizer for optimizer, maker in OPTIMIZERS.items() if maker.is_elementwise]
    if name == "fsdp" and values["peft"] == "none" and values["optimizer"] not in alone:
        raise ConfigError(
            f"--strategy fsdp gives each device a part of every weight, and --optimizer "
            f"{values['optimizer']} looks at a weight as a whole: use {' or '.join(alone)}, or "
            "--strategy ddp"
        )


def _refused_by_deepspeed(
    values: Mapping[str, Any], stage: int, num_states: int
) -> dict[str, bool]:
    """What a stage cannot do, nothing for stage 0, which is none of DeepSpeed's."""
    refused: dict[str, bool] = {}
    if stage:
        refused = {
            f"--optimizer {values['optimizer']}": values["optimizer"] != "adamw",
            # its scale is ours
            f"--precision {values['precision']}": values["precision"] == "fp16",
            # these two change gradients between backward and step
            f"--peft {values['peft']}": values["peft"] == "adalora",
            "several states": values["peft"] == "state" and num_states > 1,
            # hooks of Python that a graph would not replay
            "--cuda_graph 1": values["cuda_graph"] == 1,
        }
    if stage == 3:
        refused |= {
            # it would shard and cast the stored numbers
            f"--quant {values['quant']}": values["quant"] != "none",
            # its penalty reads weights that are not gathered
            "the kasa_config of --peft lora": "kasa_config" in values["peft_config"],
            "--compile 1": values["compile"] == 1,
        }
    return refused
