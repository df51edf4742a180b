"""Adapters that begin with a part of the base weights: PiSSA and OLoRA.

The first values A0, B0 come from the base, and s B0 A0 is taken out of it, so that nothing changes
at the start. What was learned is s (B A - B0 A0) on the original base: a plain LoRA of twice the
rank, A over A0 and B beside -B0. In that form it is saved, so that every program that reads LoRA
opens it; splitting it gives the parts again, to train further.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_peft.models.awaited import AwaitedLinear

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

# of a weight that are float64 at a time
ROWS = 1024
# of a parameter or of a tensor in a file
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?=\.|$)")


def layers(model: nn.Module) -> "Iterator[tuple[str, LoraLayer]]":
    """Name and layer of each LoRA in a model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        # the factors of an embedding are kept elsewhere, and begin at zero; AdaLoRA's are no layers
        factors = module.lora_A if isinstance(module, LoraLayer) else None
        if factors and isinstance(factors, nn.ModuleDict):
            yield name, module


@torch.no_grad()
def begin(
    model: nn.Module, init: str, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Gives a model's plain LoRA layers an initialisation of peft's and takes it from the base.

    Args:
        weights: of the base as in its file; see `take_out`.
    Returns:
        a copy of the first values, by the names of the parameters.
    """
    start = {}
    for name, layer in layers(model):
        (adapter,) = layer.lora_A
        base: Any = layer.get_base_layer()
        stored, dtype = base.weight.data, base.compute_dtype
        # a copy, as peft's own initialisations write in place; its residual is not kept, since
        # it is that of factors which are yet to be rounded to the model's dtype
        base.weight.data = _original(name, base, weights)
        if init.lower().startswith("pissa"):
            layer.pissa_init(adapter, init.lower())
        else:
            layer.olora_init(adapter)
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            factor.weight.data = factor.weight.data.to(dtype).contiguous()
        base.weight.data = stored
        start[f"{name}.lora_A.{adapter}.weight"] = layer.lora_A[adapter].weight.detach().clone()
        start[f"{name}.lora_B.{adapter}.weight"] = layer.lora_B[adapter].weight.detach().clone()
    take_out(model, start, weights)
    return start


@torch.no_grad()
def take_out(
    model: nn.Module, start: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Subtracts s B0 A0 from the base weights, rounded once to float32 and to what they store.

    Args:
        weights: of the base as in its file, which a layer that stores its weight in fewer bits has
            no longer: what is stored is the residual of these.
    """

    def subtract(name: str, layer: Any, base: Any) -> None:
        (adapter,) = layer.lora_A
        weight = _original(name, base, weights)
        a, b = (start[f"{name}.lora_{x}.{adapter}.weight"].to(weight.device) for x in "AB")
        add_product(weight, b, a, -layer.scaling[adapter])
        base.store(weight)

    for name, layer in layers(model):
        base: Any = layer.get_base_layer()
        rest = partial(subtract, name, layer)
        if isinstance(base, AwaitedLinear):
            base.change = rest
        else:
            rest(base)


def _original(name: str, base: Any, weights: Mapping[str, Tensor] | None) -> Tensor:
    """The float32 weight of a layer before anything was taken out of it, a copy."""
    if not base.storage:
        dense: Tensor = base.dense(torch.float32, copy=True)
        return dense
    assert weights is not None
    return weights[f"{name}.weight"].to(base.weight.device, torch.float32, copy=True)


def add_product(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> None:
    """Adds s B A to a float32 weight, in place.

    In float64: numbers that are then stored in few bits are the same on every machine, while the
    order of float32 sums would move those that lie between two of these.
    """
    for rows, part in zip(weight.split(ROWS), b.split(ROWS), strict=True):
        rows.copy_(rows.double().addmm_(part.double(), a.double(), alpha=scale))


@torch.no_grad()
def begin_again(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    start: dict[str, Tensor],
    saved: Mapping[str, Tensor],
) -> None:
    """Takes the first values of a saved run out of the base, in place of those drawn here.

    Another machine or number of threads may have drawn other ones.

    Args:
        weights: of the base, as they are without any residual.
        start: drawn here; becomes `saved`, by the same names.
    """
    if all(torch.equal(start[name].cpu(), x.cpu()) for name, x in saved.items()):
        return
    for name, layer in layers(model):
        base: Any = layer.get_base_layer()
        if not base.storage and not isinstance(base, AwaitedLinear):
            base.store(weights[f"{name}.weight"].to(base.weight.device))
    start.update({name: x.to(start[name], copy=True) for name, x in saved.items()})
    take_out(model, start, weights)


def join_start(values: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of the plain LoRA of twice the rank that equals values less their start.

    Those of an embedding, which began with nothing of the base, are joined to zeros.
    """
    found = {}
    for name, value in values.items():
        factor = _FACTOR.search(name)
        if not factor:
            found[name] = value
            continue
        first = start[name].to(value) if name in start else torch.zeros_like(value)
        found[name] = (
            torch.cat((value, first)) if factor[1] == "A" else torch.cat((value, -first), 1)
        )
    return found


def split_start(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of `join_start`: values and start."""
    values, start = {}, {}
    for name, x in tensors.items():
        factor = _FACTOR.search(name)
        if not factor:
            values[name] = x
            continue
        is_a = factor[1] == "A"
        values[name], first = (part.contiguous() for part in x.chunk(2, 0 if is_a else 1))
        if "embedding" not in factor[0]:
            start[name] = first if is_a else -first
    return values, start


def with_rank(config: "LoraConfig", factor: float) -> "LoraConfig":
    """The config with all ranks times `factor` and the scale of each layer as it was."""
    config = copy.deepcopy(config)
    alpha = math.sqrt(factor) if config.use_rslora else factor
    config.r = round(config.r * factor)
    config.lora_alpha = _whole(config.lora_alpha * alpha)
    config.rank_pattern = {k: round(v * factor) for k, v in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {k: _whole(v * alpha) for k, v in (config.alpha_pattern or {}).items()}
    return config


def _whole(x: float) -> Any:
    return round(x) if math.isclose(x, round(x)) else x
