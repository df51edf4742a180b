"""What AdaLoRA does beside forward and backward: a penalty, and moving rank between modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.methods.attach import ADAPTER, Attachment


class AdaLora:
    """The two duties that peft leaves to its own forward and to the training loop."""

    def __init__(self, attachment: Attachment) -> None:
        assert attachment.peft_model is not None
        self._attachment, self._step = attachment, 0
        self._tuner: Any = attachment.peft_model.base_model
        self._weight = attachment.peft_model.peft_config[ADAPTER].orth_reg_weight

    @staticmethod
    def is_in(attachment: Attachment) -> bool:
        """Whether the method is AdaLoRA."""
        model = attachment.peft_model
        return model is not None and model.peft_config[ADAPTER].peft_type == "ADALORA"

    def penalty(self) -> Tensor:
        """Mean distance of the factors from orthogonal ones, times `orth_reg_weight`."""
        distances = []
        for name, p in self._attachment.items():
            if ".lora_A." in name or ".lora_B." in name:
                product = p @ p.T if ".lora_A." in name else p.T @ p
                unit = torch.eye(len(product), device=p.device, dtype=p.dtype)
                distances.append(torch.linalg.matrix_norm((product - unit).float()))
        penalty: Tensor = self._weight * torch.stack(distances).mean()
        return penalty

    def allocate(self, masters: Mapping[str, nn.Parameter]) -> None:
        """Moves rank to where it matters; called after each step, before gradients are cleared."""
        for name, parameter in self._attachment.items():
            if parameter is not masters[name] and masters[name].grad is not None:
                parameter.grad = masters[name].grad.to(parameter.dtype)  # type: ignore[union-attr]
        self._tuner.update_and_allocate(self._step)
        self._step += 1
        for name, parameter in self._attachment.items():
            master = masters[name]
            if parameter is not master:
                parameter.grad = None
                if ".lora_E." in name:
                    master.data.masked_fill_(parameter == 0, 0.0)
