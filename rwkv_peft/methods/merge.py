"""Adding an adapter into the weights it was trained on, one module at a time, in float32."""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods.attach import inject
from rwkv_peft.models import build
from rwkv_peft.models.geometry import Geometry

if TYPE_CHECKING:
    from peft import LoraConfig


def merged_weights(
    base: Mapping[str, Tensor],
    geometry: Geometry,
    config: "LoraConfig",
    adapter: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged float32 weight of every module that the adapter changes.

    Only one module is held at a time. The arithmetic is peft's own, for any of its layers.

    Args:
        base: the weights the adapter was trained on.
        adapter: tensors named as in a peft file, without the `base_model.model.` prefix.
    Raises:
        CheckpointError: the adapter names a module that the base does not have, or does not fit.
    """
    from peft import set_peft_model_state_dict

    skeleton = build(geometry, op="reference")
    for name, tensors in _by_module(adapter, skeleton).items():
        weight_name = f"{name}.weight"
        if weight_name not in base:
            raise CheckpointError(f"the adapter changes {name}, which the base does not have")
        module = copy.deepcopy(skeleton.get_submodule(name))
        module.weight = nn.Parameter(base[weight_name].float(), requires_grad=False)
        root = _nested(name, module)
        inject(root, _only(config, name))
        try:
            result = set_peft_model_state_dict(root, dict(tensors))
        except RuntimeError as error:
            raise CheckpointError(f"the adapter does not fit {name}: {error}") from error
        if result.unexpected_keys:
            raise CheckpointError(
                f"the adapter holds {result.unexpected_keys[0]}, which its config does not explain"
            )
        layer: Any = root.get_submodule(name)
        layer.merge(safe_merge=True)
        yield weight_name, layer.get_base_layer().weight.detach()


def _only(config: "LoraConfig", name: str) -> "LoraConfig":
    """The config for a tree that holds one module alone, its patterns resolved for that module."""
    from peft.utils.other import get_pattern_key

    config = copy.deepcopy(config)
    for pattern, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = getattr(config, pattern)
        key = get_pattern_key(values, name)
        setattr(config, field, values.get(key, getattr(config, field)))
        setattr(config, pattern, {})
    config.target_modules = {name}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _by_module(adapter: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[str, Tensor]]:
    modules = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in adapter.items():
        owner = key
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        if not owner:
            raise CheckpointError(
                f"the adapter holds {key}, which belongs to no module of the base"
            )
        found.setdefault(owner, {})[key] = value
    return found


def _nested(name: str, module: nn.Module) -> nn.Module:
    """A tree of empty modules that holds one module under its full name."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module
