"""What a run does, once nothing is left open: its settings, and the facts they were chosen from."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rwkv_peft.config import Switch, TrainConfig
from rwkv_peft.data.batching import Dataload
from rwkv_peft.data.documents import Documents
from rwkv_peft.device import dtype_of
from rwkv_peft.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(TrainConfig):
    """A `TrainConfig` with a value in every field; see there for their meaning.

    It is what config.yaml of a run holds, and a config of these values gives it again.
    """

    ctx_len: int
    micro_bsz: int
    dataload: Dataload
    epoch_count: int
    lr_init: float
    lr_final: float
    warmup_steps: int
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    optimizer_cpu: Switch
    emb_cpu: Switch
    grad_cp: Literal[0, 1, 2]
    compile: Switch
    cuda_graph: Switch

    @property
    def is_infctx(self) -> bool:
        """Whether rows go through the model in chunks."""
        return self.bptt_chunks != 0

    @property
    def num_ranks(self) -> int:
        """How many devices share the work, on all machines."""
        return self.devices * self.num_nodes

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return dtype_of(self.precision)


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be known before the settings of a run can be chosen.

    Attributes:
        model_config: of the model's file.
        device: that training runs on.
        documents: to learn.
        free_folder: a name for the run's folder that is not taken.
        saved_method: method of the adapter or state to train further; "" if there is none.
        num_weights: of the model.
        memory: bytes that are free on the device; None if nobody can say.
        held_out: documents to evaluate on, None if there are none.
    """

    model_config: ModelConfig
    device: torch.device
    documents: Documents
    free_folder: str
    saved_method: str
    num_weights: int
    memory: int | None
    held_out: Documents | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A value chosen for a field, and why."""

    name: str
    value: Any
    reason: str
