"""Which methods work on a base that is stored in 8 or 4 bits."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.catalog import is_start
from rwkv_peft.models.frozen import FrozenLinear

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# of a config itself, none of which changes what a layer computes
_FORM = (
    *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision"),
    *("auto_mapping", "peft_version", "runtime_config"),
)
# method -> its options that need no dense weight; any other must have its default
SERVED: dict[str, tuple[str, ...]] = {
    "lora": (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
        *("rank_pattern", "alpha_pattern", *_WHERE),
    ),
    "miss": ("r", "miss_dropout", "mini_r", "init_weights", *_WHERE),
    "state": (),
}
# values of an option that change the weight itself
_CHANGES = {"init_weights": ("bat",)}


def require_served(method: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError if a method, or an option, needs dense weights.

    Args:
        options: those of the method's config in peft that have not their default.
    """
    if method not in SERVED:
        what = "trains the weights themselves" if method == "none" else "is not for such weights"
        raise ConfigError(
            f"--quant cannot serve --peft {method}, which {what}: use {', '.join(SERVED)}, or "
            "--quant none"
        )
    for name, value in options.items():
        if is_start(value):
            what = "takes a part out of the weights before they are stored, which is not built"
        elif name not in SERVED[method] or value in _CHANGES.get(name, ()):
            what = "needs dense weights"
        else:
            continue
        raise ConfigError(
            f"--quant cannot serve {name}={value!r} of {method}, which {what}: leave the option "
            "out, or use --quant none"
        )


def require_config(model: "nn.Module", config: "PeftConfig") -> None:
    """Raises ConfigError if a method cannot work on the layers that a model stores."""
    if not any(isinstance(x, FrozenLinear) and x.storage for x in model.modules()):
        return
    changed = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FORM}
    for field in fields(config):
        own = field.default
        if own is MISSING:
            own = field.default_factory() if field.default_factory is not MISSING else None
        if field.name in changed and changed[field.name] in (own, None):
            del changed[field.name]
    require_served(str(config.peft_type.value).lower(), changed)
