"""The model of a run, from its file to its device, or to the devices that share it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rwkv_peft.checkpoint.pth import load_weights
from rwkv_peft.checkpoint.stream import require_finite
from rwkv_peft.device import leave_on_host
from rwkv_peft.models import build
from rwkv_peft.models.awaited import AwaitedLinear
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.models.offload import HostStore
from rwkv_peft.parallel.fsdp import Fsdp
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.quant import Storage, quantise, stored_layers
from rwkv_peft.quant.linear import QuantisedLinear
from rwkv_peft.state import RWKVState
from rwkv_peft.training.memory import fits_whole
from rwkv_peft.training.settings import Facts, Settings
from rwkv_peft.training.target import TrainTarget, Weights


def load_base(
    settings: Settings, facts: Facts, base: Mapping[str, Tensor], strategy: Strategy
) -> RWKV:
    """The model of a run, frozen on its device.

    If ranks are going to have parts of what is trained, its weights are as they are in the file, in
    no memory yet, and `share_trained` brings them to the devices. If they are going to have parts
    of frozen blocks, the projections of these are awaited until `Strategy.shard`.
    """
    torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    device, dtype = facts.device, settings.dtype
    model = build(facts.model_config, op=settings.op, device=device, dtype=dtype)
    model.grad_cp = settings.grad_cp > 0
    model.host = HostStore() if settings.grad_cp == 2 else None
    if _shares_trained(settings, strategy):
        load_weights(model, base, dtype=None)
        if model.initial_state is not None:
            model.initial_state = RWKVState(*(x.to(device) for x in model.initial_state))
    else:
        storage = None
        if settings.quant != "none":
            storage = Storage(settings.quant, dtype, bool(settings.quant_head))
        if isinstance(strategy, Fsdp):
            await_blocks(model, settings, facts, base, storage)
        load_weights(model, base, device=device, dtype=dtype, storage=storage)
        # on the device, where it is one more reading of the weights and one wait
        looked_at: dict[str, Tensor] = dict(model.named_parameters())
        for name, layer in model.named_modules():
            if isinstance(layer, QuantisedLinear):
                looked_at[f"{name}.weight"] = layer.largest
            elif isinstance(layer, AwaitedLinear):
                del looked_at[f"{name}.weight"]
        require_finite(looked_at, settings.load_model, base)
    if settings.emb_cpu:
        value = model.emb.weight.data.to(dtype)
        model.emb.weight = nn.Parameter(leave_on_host(value, device), False)
    return model


def await_blocks(
    model: RWKV,
    settings: Settings,
    facts: Facts,
    base: Mapping[str, Tensor],
    storage: Storage | None,
) -> None:
    """Has the projections of blocks await their weights, which are looked at when they are read."""

    def read(name: str) -> FrozenLinear:
        weight = base[name].to(facts.device)
        if storage:
            stored = quantise(weight, storage)
            require_finite({name: stored.largest}, settings.load_model, base)
            return stored
        weight = weight.to(settings.dtype)
        require_finite({name: weight}, settings.load_model, base)
        with torch.device("meta"):
            layer = FrozenLinear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    for name, layer in list(stored_layers(model)):
        shape = layer.out_features, layer.in_features
        awaited = AwaitedLinear(
            partial(read, f"{name}.weight"),
            shape,
            settings.dtype,
            facts.device,
            storage.name if storage else "",
        )
        model.set_submodule(name, awaited)


def share_trained(
    settings: Settings,
    facts: Facts,
    base: Mapping[str, Tensor],
    strategy: Strategy,
    model: RWKV,
    target: TrainTarget,
) -> None:
    """Gives each rank its part of what is trained, block by block, if its strategy shares that."""
    if not _shares_trained(settings, strategy):
        return
    assert isinstance(strategy, Fsdp) and isinstance(target, Weights)

    def place(parameters: Mapping[str, nn.Parameter]) -> None:
        for x in parameters.values():
            x.data = x.data.to(facts.device, settings.dtype)
        require_finite(parameters, settings.load_model, base)

    # a backward in which the head alone has a gradient goes through no block
    is_head_alone = all(name.startswith("head.") for name in target.parameters)
    whole = {*model.version.unread, *(target.parameters if is_head_alone else ())}
    # to share out a vector costs as many calls as a matrix
    whole |= {name for name, x in model.named_parameters() if x.numel() <= model.emb.embedding_dim}
    # what one rank has room for decides for all
    num_trained = sum(x.numel() for x in target.parameters.values())
    gathers_once = strategy.from_first(lambda: fits_whole(settings, facts, num_trained))
    strategy.shard_trained(
        model, model.blocks, whole, settings.dtype, place, gathers_once=gathers_once
    )
    named = dict(model.named_parameters())
    target.parameters.update({name: named[name] for name in target.parameters})


def _shares_trained(settings: Settings, strategy: Strategy) -> bool:
    return isinstance(strategy, Fsdp) and settings.peft == "none"
