"""Attaching a method to a model: the one place that decides what is trained."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.methods import TARGET_MODULES, Method
from rwkv_peft.models.base import RWKV

if TYPE_CHECKING:
    from peft import LoraConfig

# options of peft's LoraConfig that act on the projections alone, so that merging can undo them
LORA_OPTIONS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
)
# initialisations that leave the base weights as they are
LORA_INITS = (True, False, "gaussian", "orthogonal")


def attach(model: RWKV, method: Method, options: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Freezes the model, attaches the method and gives the tensors to train, by name.

    Args:
        method: 'none' trains every tensor that the forward reads, 'lora' low-rank adapters.
        options: the method's own peft config, without its defaults.
    Raises:
        ConfigError: an option is unknown, or names a module that the model does not have.
    """
    model.requires_grad_(False)
    if method == "none":
        unread = {f"blocks.0.att.v{i}" for i in range(3)}
        trained = {n: p for n, p in model.named_parameters() if n not in unread}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        return trained
    return attach_config(model, lora_config(options, model.geometry.version))


def attach_config(model: RWKV, config: "LoraConfig") -> dict[str, nn.Parameter]:
    """Like `attach`, with peft's own config, for example of a saved adapter."""
    model.requires_grad_(False)
    inject(model, config)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora_config(options: Mapping[str, Any], version: str) -> "LoraConfig":
    """peft's own LoraConfig with the default targets of an RWKV version.

    Raises:
        ConfigError: an option is unknown, not supported or has an impossible value.
    """
    from peft import LoraConfig

    for name in options:
        if name not in LORA_OPTIONS:
            near = get_close_matches(name, LORA_OPTIONS, 1)
            raise ConfigError(
                f"peft_config of lora has no option '{name}'"
                + (f", did you mean '{near[0]}'?" if near else "")
                + f" Allowed: {', '.join(LORA_OPTIONS)}"
            )
    init = options.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in LORA_INITS:
        raise ConfigError(
            f"init_lora_weights={init!r} is not supported: use true, false, 'gaussian' or "
            "'orthogonal'"
        )
    try:
        return LoraConfig(**{"target_modules": list(TARGET_MODULES[version]), **options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft_config: {error}") from error


def inject(model: nn.Module, config: "LoraConfig") -> None:
    """Puts the layers of a config into the model, in place.

    Raises:
        ConfigError: a target module matches nothing, or cannot be adapted.
    """
    from peft import inject_adapter_in_model

    targets = config.target_modules
    if not isinstance(targets, str):
        names = [name for name, _ in model.named_modules()]
        for target in targets or ():
            if not any(name == target or name.endswith(f".{target}") for name in names):
                leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if _is_leaf(m)}
                raise ConfigError(
                    f"target_modules: '{target}' is no module of this model; there are "
                    + ", ".join(sorted(leaves))
                )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"peft_config: {str(error).splitlines()[0]}") from error


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding))
