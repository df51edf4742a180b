"""What a method asks to be minimised beside the loss."""

from typing import Any

from torch import Tensor

from rwkv_peft.methods.attach import ADAPTER, Attachment


def penalty(attachment: Attachment) -> Tensor | None:
    """The terms of KaSA, by the beta and gamma of its config; None for other methods.

    peft computes them, and leaves it to the training loop to add them.
    """
    model = attachment.peft_model
    if model is None or getattr(model.peft_config[ADAPTER], "kasa_config", None) is None:
        return None
    tuner: Any = model.base_model
    terms: Tensor = tuner._get_kasa_loss()
    return terms
