"""What `step.py` measures beside our step: fla's model of RWKV-7 with LoRA of Hugging Face peft.

Both are the packages as pip installs them. The model has the weights and the adapter of ours, so
its loss and gradients are compared as those of our own ways are. It runs as its documentation
shows, with settings that are the fastest it has without a compiler: adapters in bf16, PyTorch's
fused AdamW over them, no recomputing.
"""

import warnings
from typing import Any

import torch
from gpu_step import config_of, make_model
from torch import Tensor, nn

from rwkv_peft.exports.hf import FLA, make_config
from rwkv_peft.exports.stored import all_mapped
from rwkv_peft.ops.fla import cap_autotuning

# settings of its kernels that fla tries; all of them take minutes a shape
CONFIGS = 4
TARGETS = ["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value"]


class FlaCase:
    """A step of fla's model over the batch of one of ours, with the same values.

    Args:
        ours: the case whose adapter and batch it takes.
        rank: of the adapter.
    """

    def __init__(self, size: str, ours: Any, rank: int) -> None:
        values = {name: x.bfloat16() for name, x in ours.optimizer.values.items()}
        self._batch = ours.batch
        cap_autotuning(CONFIGS)
        self._model = make_peer(size, rank)
        own = dict(self._model.named_parameters())
        self._trained = {name: own[adapter_name(name)] for name in values}
        for name, x in values.items():
            self._trained[name].data.copy_(x)
        parameters = list(self._trained.values())
        assert len(parameters) == sum(x.requires_grad for x in own.values())
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def backward(self) -> Tensor:
        """Adds the gradients of the batch; gives its mean loss."""
        tokens, targets = (x.cuda() for x in (self._batch.tokens, self._batch.targets))
        # the model moves labels by one place itself, so that the last token has none
        labels = torch.cat((targets[:, :1], targets[:, :-1]), 1)
        loss: Tensor = self._model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def take(self) -> None:
        """One optimizer step."""
        self.backward()
        nn.utils.clip_grad_norm_(list(self._trained.values()), 1.0, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> tuple[float, Tensor]:
        """Loss, and all gradients in one vector in the order of ours."""
        loss = self.backward().item()
        found = [x.grad for x in self._trained.values()]
        vector = torch.cat([x.flatten().float() for x in found if x is not None]).cpu()
        self._optimizer.zero_grad(set_to_none=True)
        return loss, vector


def make_peer(size: str, rank: int) -> Any:
    """fla's model with the weights that `make_model` draws, under an adapter of peft's."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
    config = RWKV7Config(**make_config(config_of(size), "bfloat16", is_fla=True))
    with torch.device("cuda"):
        model = RWKV7ForCausalLM(config).bfloat16()
    official = {
        name: x.detach()
        for name, x in make_model(size, "auto", torch.device("cuda")).named_parameters()
    }
    foreign = FLA.to_foreign(all_mapped(official))
    model.load_state_dict({name: x.whole() for name, x in foreign.items()})
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def adapter_name(name: str) -> str:
    """peft's name of a tensor of our adapter, `blocks.0.att.key.lora_A.default.weight`."""
    owner, kind, rest = name.partition(".lora_")
    (foreign,) = FLA.to_foreign(all_mapped({f"{owner}.weight": torch.empty(0)}))
    return f"base_model.model.{foreign.removesuffix('.weight')}{kind}{rest}"
