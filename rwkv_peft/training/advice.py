"""What to change where a run may not fit into its device."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rwkv_peft.device import has_host_memory
from rwkv_peft.methods.stored import REFUSED
from rwkv_peft.training.choose_device import trains_embedding
from rwkv_peft.training.memory import guess_memory, has_room_on_host
from rwkv_peft.training.settings import Facts, Settings


def advise_memory(
    settings: Settings, facts: Facts, op: str, num_weights: int, num_trained: int
) -> str | None:
    """A line for a person where training may take more than is free on the device, or None.

    It names as few changes as may make it fit, those first that change nothing of what is learned.
    """
    if facts.memory is None:
        return None

    def guess(changed: Settings) -> float:
        return guess_memory(changed, facts.model_config, op, num_weights, num_trained)

    if guess(settings) <= facts.memory:
        return None
    changes: dict[str, Any] = {}
    for change in _smaller(settings, facts, num_trained):
        changes |= change
        if guess(replace(settings, **changes)) <= facts.memory:
            break
    free = facts.memory / 2**30
    if not changes:
        return f"memory: {free:.1f} GiB are free, and the run may not fit"
    flags = " ".join(f"--{name} {value}" for name, value in changes.items())
    less = guess(replace(settings, **changes)) / 2**30
    return (
        f"memory: {free:.1f} GiB are free, and the run may not fit; with {flags} it takes about "
        f"{less:.1f}"
    )


def _smaller(settings: Settings, facts: Facts, num_trained: int) -> Iterator[dict[str, Any]]:
    """Changes that take less memory, each beside those before it."""
    can_leave, size = has_host_memory(facts.device), settings.dtype.itemsize
    values = {"peft": settings.peft, "peft_config": settings.peft_config}
    values["train_parts"] = settings.train_parts
    if not settings.grad_cp:
        yield {"grad_cp": 1}
    if settings.micro_bsz > 1:
        rows = settings.micro_bsz * settings.accumulate_grad_batches
        yield {"micro_bsz": 1, "accumulate_grad_batches": rows}
    if not settings.emb_cpu and can_leave and not trains_embedding(values):
        yield {"emb_cpu": 1}
    if settings.grad_cp < 2 and can_leave:
        yield {"grad_cp": 2}
    # what is on the host already is no smaller on the device
    if settings.peft != "state" and settings.num_ranks == 1 and not settings.optimizer_cpu:
        optimizer = settings.optimizer
        if optimizer == "adamw":
            optimizer = "adamw8bit"
            yield {"optimizer": optimizer}
        if can_leave and has_room_on_host(num_trained, size, optimizer):
            yield {"optimizer_cpu": 1}
    trains_more = settings.train_parts or settings.peft_config.get("modules_to_save")
    if settings.peft in REFUSED or trains_more:
        return
    if settings.quant in ("none", "fp8"):
        yield {"quant": "int8", "quant_head": 1}
    is_nested = settings.quant.endswith("_nested")
    if not (is_nested or (settings.quant in ("nf4", "fp4") and settings.quant_head)):
        yield {"quant": "nf4", "quant_head": 1}
    if not (is_nested and settings.quant_head):
        yield {"quant": "nf4_nested", "quant_head": 1}
