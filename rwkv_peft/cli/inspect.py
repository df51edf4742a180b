"""`rwkv-peft inspect FILE`"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.cli.given import find_kind, find_parts, find_run, find_whole, require_no_log
from rwkv_peft.cli.parse import parse
from rwkv_peft.errors import ConfigError, RwkvPeftError
from rwkv_peft.language import translate
from rwkv_peft.printing import print_json, print_line

FULL_STATE = (
    "a full state, with the vectors before the first token: other programs read plain ones, of "
    "--train_type state"
)


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """What to look at."""

    file: str = ""
    """A .pth or .safetensors file of a model, an adapter or a state, or the folder of an adapter or
    a run."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Prints version, model config, dtypes, parameter count and what is odd about a file."""
    options = parse(InspectOptions, args, command="inspect", positional=("file",))
    if not options.file:
        raise ConfigError("no file given: rwkv-peft inspect model.pth")
    facts = describe(options.file)
    if options.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "; ".join(map(translate, value)) or translate("nothing")
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print_line(f"{name:<20} {value}")
    return 0


def describe(path: str | Path) -> dict[str, Any]:
    """The facts of a model's file, an adapter or a state, ready for JSON.

    Raises:
        CheckpointError: it cannot be read, is none of them, or a checksum of a .pth is wrong.
    """
    from rwkv_peft.checkpoint.older import old_method
    from rwkv_peft.checkpoint.records import require_sums
    from rwkv_peft.checkpoint.state import holds_state_alone
    from rwkv_peft.exports.opened import is_model_folder

    path = find_whole(str(path))
    if (kind := find_kind(path)) in ("run", "checkpoint"):
        return _describe_run(str(path), kind)
    if kind == "other":
        require_no_log(path, "inspect")
    if kind == "adapter" and Path(path).is_dir():
        return _describe_folder(path)
    if Path(path).is_dir() and not is_model_folder(Path(path)):
        raise ConfigError(
            f"{path} is a folder, of no run, adapter or model: give a file of weights in it, "
            "or the folder of a run or an adapter"
        )
    require_sums(path)
    if method := old_method(path) or ("state" if holds_state_alone(path) else ""):
        facts = {"file": str(path), "method": method, **_totals(path)}
        return facts | ({"odd": [FULL_STATE]} if method == "state" and _is_full(path) else {})
    return _describe_model(path)


def _describe_folder(path: str | Path) -> dict[str, Any]:
    from rwkv_peft.checkpoint.adapter import read_adapter, saved_method

    adapter = read_adapter(path)
    config = adapter.config.to_dict()
    shown = ("r", "lora_alpha", "init_weights", "target_modules", "base_model_name_or_path")
    facts: dict[str, Any] = {"folder": str(path), "method": saved_method(path)}
    facts |= {name: config[name] for name in shown if config.get(name) is not None}
    if isinstance(targets := facts.get("target_modules"), set):
        facts["target_modules"] = sorted(targets)
    facts["base"] = adapter.note.get("base") or "not noted"
    facts["parameters"] = sum(x.numel() for x in adapter.tensors.values())
    return facts


def _is_full(path: str | Path) -> bool:
    """Whether a state file holds more than the states of the recurrence."""
    from rwkv_peft.checkpoint.pth import read_weights

    return any(not name.endswith("time_state") for name in read_weights(path))


def _describe_run(path: str, kind: str) -> dict[str, Any]:
    """What a run was and what it left, as far as its folder says."""
    from rwkv_peft.training.folder import read_settings

    folder = find_run(Path(path, "rwkv")) or Path(path)
    settings = read_settings(folder) or {}
    shown = ("peft", "load_model", "data_file", "template", "epoch_count", "lr_init", "ctx_len")
    facts: dict[str, Any] = {"folder": path, "kind": kind, **{n: settings.get(n) for n in shown}}
    try:
        parts = find_parts(path, "inspect")
    except ConfigError as error:
        return facts | {"newest": None, "odd": [str(error)]}
    newest = parts.adapter or parts.state or parts.model
    return facts | {"newest": {newest: find_kind(newest)}}


def _totals(path: str | Path) -> dict[str, Any]:
    from rwkv_peft.checkpoint.pth import read_weights

    weights = read_weights(path)
    dtypes = Counter(str(x.dtype).removeprefix("torch.") for x in weights.values())
    return {
        "dtype": dict(dtypes),
        "parameters": sum(x.numel() for x in weights.values()),
        "bytes": sum(p.stat().st_size for p in (Path(path), *Path(path).rglob("*")) if p.is_file()),
    }


def _describe_model(path: str | Path) -> dict[str, Any]:
    from rwkv_peft.checkpoint.pth import read_weights, require_fit
    from rwkv_peft.models import build, read_model_config

    weights = read_weights(path)
    # what is missing does not hinder a look at the rest
    model_config = read_model_config({name: tuple(x.shape) for name, x in weights.items()})
    odd = []
    try:
        require_fit(build(model_config, op="reference"), weights)
    except RwkvPeftError as error:
        odd.append(str(error))
    totals = _totals(path)
    if len(totals["dtype"]) > 1:
        odd.append("tensors of several types")
    if not model_config.has_first_value_mix:
        odd.append("no blocks.0.att.v0, v1, v2 (nothing reads them; some releases lack them)")
    broken = [n for n, x in weights.items() if not bool(x.isfinite().all())]
    odd += [f"{name} holds values that are not finite" for name in broken]
    if model_config.vocab_size != 65536:
        odd.append(f"vocabulary {model_config.vocab_size}, official files have 65536")
    facts = {"file": str(path), **asdict(model_config), "n_head": model_config.n_head}
    return {**facts, **totals, "odd": odd}
