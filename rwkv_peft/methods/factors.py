"""What a method makes of the base weights when it is attached, by decomposing them.

Another number of threads or another LAPACK makes other factors, and what was trained between them
means nothing without its own. peft leaves those of PSOFT and OSF out of its files, and of FRoD it
saves V, but not U, which follows from V and the base weight and is as large as that. AdaMSS
clusters the rows of a weight, and its files lack which row is in which cluster.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# methods that decompose the base weights, and whose files lack part of what they find
_READ_BASE = ("ADAMSS", "FROD", "OSF", "PSOFT", "TINYLORA")
# rows of the base as they are
_COPIES = ".trainable_tokens_original"


def keep(peft_model: "PeftModel", config: "PeftConfig") -> tuple[str, ...]:
    """Has peft save and load the factors with the adapter, and gives their names in its files.

    What the config leaves out by an option of its own (`save_projection` …) stays out.
    """
    from peft.tuners._buffer_dict import BufferDict

    if any(key.startswith("save_") and value is False for key, value in vars(config).items()):
        return ()
    for layer in _clustered(peft_model).values():
        # a name that peft saves, beside the one that it reads
        layer.adamss_rows = BufferDict(layer.scatter_index)
        layer.__dict__["scatter_index"] = layer.adamss_rows
    saved, names = peft_model.state_dict().keys(), []
    for path, module in peft_model.named_modules():
        if not isinstance(module, BufferDict) or path.endswith(_COPIES):
            continue
        for adapter, x in module.items():
            if f"{path}.{adapter}" not in saved:
                module.register_buffer(adapter, x)
                names.append(path)
    return tuple(names)


def reads_base(config: "PeftConfig") -> bool:
    """Whether what is not in an adapter's file is computed from the base when it is attached.

    From a base in another dtype than in training something else would come out: other factors, or
    for KaSA, which takes the smallest singular values out of the base weights, another base.
    """
    return config.peft_type in _READ_BASE or getattr(config, "kasa_config", None) is not None


def leaves_out(config: "PeftConfig") -> bool:
    """Whether files of an adapter lack, by its config, factors that follow from the base alone."""
    return config.peft_type == "FROD" and not config.save_projection


def fit(peft_model: "PeftModel", tensors: Mapping[str, Tensor]) -> None:
    """Gives the parameters of AdaMSS the sizes that the clusters of a file have."""
    for path, layer in _clustered(peft_model).items():
        for kind in ("adamss_A", "adamss_B"):
            (parameters,) = getattr(layer, kind).values()
            for i, parameter in enumerate(parameters):
                if (x := tensors.get(f"{path}.{kind}.{i}")) is not None:
                    parameter.data = parameter.new_zeros(x.shape)


def _clustered(peft_model: "PeftModel") -> dict[str, Any]:
    """The layers of AdaMSS."""
    modules = peft_model.named_modules()
    return {path: module for path, module in modules if hasattr(module, "scatter_index")}


@torch.no_grad()
def follow(peft_model: "PeftModel", tensors: Mapping[str, Tensor]) -> None:
    """Gives FRoD the U that belongs to the V of a file, where attaching has made another V.

    Args:
        tensors: of the file, not yet put into the model.
    """
    tuner: Any = peft_model.base_model
    layers: list[Any] = [m for m in peft_model.modules() if hasattr(m, "frod_U")]
    for category, buffers in getattr(tuner, "frod_V", {}).items():
        v = tensors.get(f"base_model.frod_V.{category}")
        (made,) = buffers.values()
        if v is None or torch.equal(made.float().cpu(), v.float().cpu()):
            continue
        for layer in layers:
            if layer.frod_V is buffers:
                # rounded as it was in training, even if this model has a finer dtype
                weight = layer.get_base_layer().dense(v.dtype)
                u, _ = layer._calculate_frod_u_and_lambda(v, weight)
                (current,) = layer.frod_U.values()
                current.copy_(u.to(v.dtype))
