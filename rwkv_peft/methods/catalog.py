"""Methods by name: from `--peft NAME` and `--peft_config JSON` to peft's own config."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from rwkv_peft.errors import ConfigError
from rwkv_peft.methods import OWN_DEFAULTS
from rwkv_peft.methods.options import build_options, one_line
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

_ONE_ADAPTER = "it is for several trained adapters"
_DATA_INIT = "its initialisation needs a pass over data before training"
# options that would be without effect, or could not be saved, merged or read again
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "aLoRA works from certain tokens on and cannot be merged",
    "arrow_config": _ONE_ADAPTER,
    "corda_config": _DATA_INIT,
    "ensure_weight_tying": "no weights are tied",
    "eva_config": _DATA_INIT,
    "layer_replication": "it repeats blocks, and no file of RWKV holds that",
    "loftq_config": "the base is not quantised",
    "lora_bias": "the projections have no bias to merge it into",
    "lora_ga_config": _DATA_INIT,
    "megatron_config": "it is for layers of Megatron",
    "monteclora_config": "its KL term would have to be part of the loss of each micro-batch",
    "use_asa": "it needs a callback of a transformers trainer",
    "use_qalora": "the base is not quantised",
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
    config_class = _find_config(name, f"--peft {method}")
    allowed = [f.name for f in fields(config_class) if f.init and f.name not in _OURS]
    options.pop("task_type", None)  # names a class of transformers, which RWKV is not
    options = build_options(config_class, options, allowed)
    for key, reason in _REFUSED_OPTIONS.items():
        value = options.get(key)
        if value is not None and value is not False and value != {}:
            raise ConfigError(f"peft_config: {key} cannot serve RWKV: {reason}")
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
    if options.get("layers_to_transform") is not None and "layers_pattern" in allowed:
        # the word before a layer's number in names of RWKV, which peft does not know
        defaults = {"layers_pattern": "blocks", **defaults}
    with one_line("peft_config"):
        return config_class(**{**defaults, **options})


def check_saved(values: Mapping[str, Any]) -> None:
    """Checks the config of a saved adapter, a JSON object, before peft builds it.

    Raises:
        ConfigError: it names a method that cannot serve RWKV, or a value is of another type than
            the method's config declares. Options that peft does not know are left to peft.
    """
    given = values.get("peft_type") if isinstance(values, Mapping) else None
    if not isinstance(given, str):
        raise ConfigError("its config is no object with a peft_type")
    name = given.lower()
    config_class = _find_config(name, f"its method {name}")
    known = [f.name for f in fields(config_class) if f.init]
    build_options(config_class, {k: x for k, x in values.items() if k in known}, known)


def is_residual(config: "PeftConfig") -> bool:
    """Whether the method begins by taking a part out of the base weights."""
    return is_start(getattr(config, "init_lora_weights", None))


def is_start(init: object) -> bool:
    """Whether a value of `init_lora_weights` names a part of the base weights."""
    return isinstance(init, str) and init.lower().startswith(RESIDUAL_INITS)


def _find_config(name: str, what: str) -> Any:
    """The config class of a method; `what` begins the message where there is none."""
    if name not in _table():
        near = get_close_matches(name, method_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(method_names())}"
        raise ConfigError(f"{what}: no such method; {hint}")
    if reason := _reason_against(name):
        raise ConfigError(f"{what} cannot serve RWKV: {reason}")
    return _table()[name][0]


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
