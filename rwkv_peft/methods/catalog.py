"""Methods by name: from `--peft NAME` and `--peft_config JSON` to peft's own config."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from rwkv_peft.errors import ConfigError
from rwkv_peft.methods import OWN_DEFAULTS
from rwkv_peft.models import version_named

if TYPE_CHECKING:
    from peft import PeftConfig

# upstream's number of power iterations for the first singular vectors
PISSA_NITER = 4
# adapters whose base is changed when they begin, by what an initialisation takes out of it
RESIDUAL_INITS = ("pissa", "olora")
_NEEDS_DATA = ("corda", "eva", "lora_ga", "loftq")
# set by us, or of no meaning outside transformers
_OURS = ("peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping")
_REFUSED = {
    "beft": "it trains biases, and the projections of RWKV have none",
    "lily": "it cannot be merged into the weights",
    "poly": "it needs the number of a task with every row",
    "shadow": "it trains a second network beside a transformer's decoder",
    "xlora": "it mixes trained adapters of a transformers model",
}


def resolve(method: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the options that a new adapter of a method has in peft.

    `pissa` is `lora` with that initialisation, of `svd_niter` power iterations, and a scale of 1
    unless `lora_alpha` is given.
    """
    name, found = method.lower().replace("-", "_"), dict(options)
    if name != "pissa":
        return name, found
    niter = found.pop("svd_niter", PISSA_NITER)
    found.setdefault("init_lora_weights", f"pissa_niter_{niter}")
    if "r" in found:
        found.setdefault("lora_alpha", found["r"])
    return "lora", found


def method_names() -> list[str]:
    """Every name that `--peft` takes."""
    served = [name for name in _table() if _reason_against(name) is None]
    return ["none", "state", *sorted({*served, "pissa"})]


def method_config(method: str, options: Mapping[str, Any], version: str) -> "PeftConfig":
    """peft's own config of a method, with the default modules of an RWKV version.

    Args:
        method: a name of peft's table in any case, or pissa.
        options: fields of the method's config in peft.
    Raises:
        ConfigError: the name or an option is unknown, the method cannot serve RWKV, or a value
            is impossible.
    """
    name, options = resolve(method, options)
    if name not in _table():
        near = get_close_matches(name, method_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(method_names())}"
        raise ConfigError(f"--peft {method}: no such method; {hint}")
    if reason := _reason_against(name):
        raise ConfigError(f"--peft {method} cannot serve RWKV: {reason}")
    config_class = _table()[name][0]
    allowed = [f.name for f in fields(config_class) if f.init and f.name not in _OURS]
    options.pop("task_type", None)  # names a class of transformers, which RWKV is not
    for key in options:
        if key not in allowed:
            near = get_close_matches(key, allowed, 1)
            raise ConfigError(
                f"peft_config of {name} has no option '{key}'"
                + (f", did you mean '{near[0]}'?" if near else "")
                + f" Allowed: {', '.join(allowed)}"
            )
    init = options.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_NEEDS_DATA):
        raise ConfigError(
            f"init_lora_weights={init!r} needs a pass over data or a quantised base before "
            "training: use true, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_4' or 'olora'"
        )
    targets = list(version_named(version).target_modules)
    defaults = OWN_DEFAULTS.get(name) or {"target_modules": targets}
    if any(options.get(key) for key in ("target_modules", "target_parameters")):
        defaults = {k: v for k, v in defaults.items() if not k.endswith("_modules")}
    try:
        return config_class(**{**defaults, **options})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"peft_config: {' '.join(str(error).split())}") from error


def is_residual(config: "PeftConfig") -> bool:
    """Whether the method begins by taking a part out of the base weights."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(RESIDUAL_INITS)


def _reason_against(name: str) -> str | None:
    from peft.tuners.tuners_utils import BaseTuner

    tuner = _table()[name][1]
    if tuner is None or not issubclass(tuner, BaseTuner):
        return (
            "it teaches prompts to attention layers, which RWKV does not have; what a prompt "
            "would leave behind is trained by --peft state"
        )
    return _REFUSED.get(name)


def _table() -> dict[str, tuple[Any, Any]]:
    """Name -> config and tuner class, from peft itself."""
    import peft  # noqa: F401 fills the tables
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS

    return {str(t.value).lower(): (config, TUNERS.get(t)) for t, config in CONFIGS.items()}
