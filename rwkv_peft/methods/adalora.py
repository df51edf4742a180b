"""What AdaLoRA does beside forward and backward: a penalty, and moving rank between modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.methods.attach import ADAPTER, Attachment

# what peft's allocator of ranks keeps of each number from step to step
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


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

    def allocate(
        self, gradients: Mapping[str, Tensor | None], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Moves rank to where it matters; called after each step, before gradients are cleared.

        Args:
            gradients: of the trained tensors, in float32, by name.
            values: theirs, in float32, by name.
        Returns:
            values with zeros where the 16-bit tensors of these names have them now.
        """
        narrow = {n: p for n, p in self._attachment.items() if p.dtype != torch.float32}
        for name, parameter in narrow.items():
            gradient = gradients[name]
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        self._tuner.update_and_allocate(self._step)
        self._step += 1
        for parameter in narrow.values():
            parameter.grad = None
        return {n: values[n].masked_fill(p == 0, 0.0) for n, p in narrow.items() if ".lora_E." in n}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and how important each number was in them."""
        allocator, config = self._tuner.rankallocator, self._tuner.peft_config[ADAPTER]
        importance = {name: dict(getattr(allocator, name)) for name in _IMPORTANCE}
        return {"step": self._step, "rank_pattern": config.rank_pattern, "importance": importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._step = state["step"]
        self._tuner.peft_config[ADAPTER].rank_pattern = state["rank_pattern"]
        device = next(iter(self._attachment.values())).device
        for name, values in state["importance"].items():
            copies = {n: x.to(device, copy=True) for n, x in values.items()}
            setattr(self._tuner.rankallocator, name, copies)
