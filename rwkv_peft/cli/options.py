"""Flags that several commands share."""

from dataclasses import dataclass


# without slots, so that a command may have these beside others
@dataclass(frozen=True)
class AdapterOptions:
    """What an adapter needs that its file may not hold."""

    lora_alpha: float | None = None
    """Of the training of a LoRA file of older RWKV-PEFT, which does not hold it."""
    pissa_init: str = ""
    """For PiSSA in its place, the init_pissa.pth of the run."""
    force: bool = False
    """Take an adapter that was trained on another base, or merges otherwise than it was trained."""
