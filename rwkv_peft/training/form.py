"""What the values of a checkpoint may be: whoever made one may have made it to do harm."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rwkv_peft.checkpoint.records import damage_in_one_line
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.metrics import LOGS
from rwkv_peft.training.progress import Progress

# a value of each kind that stands at each place; of an empty table all is allowed
_FORM: dict[str, Any] = {
    "step": 0,
    "settings": {},
    "base": "",
    "versions": {},
    "logs": dict.fromkeys(LOGS, 0),
    "saved": [],
    "data": "",
    "run": {
        "progress": Progress().state_dict(),
        "target": {},
        "optimizer": {"values": {}, "moments": {}},
    },
}
# names of what a run saves, within its folder
_SAVED = re.compile(r"rwkv-[^/\\\0]+(/[^/\\\0]+)?")


def require_form(values: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError unless the values of a checkpoint are of the types that are used."""
    with foreign_in_one_line(folder):
        _require(values, _FORM, "run.json")
        hints = get_type_hints(TrainConfig)
        for name, value in values["settings"].items():
            if name in hints and not _fits(value, hints[name]):
                raise TypeError(f"the setting {name} is {str(value)[:40]!r}")
        if not all(isinstance(x, str) for pair in values["versions"].items() for x in pair):
            raise TypeError("the versions are no texts")
        if len(values["saved"]) != 2 or not all(
            x is None or (isinstance(x, str) and _SAVED.fullmatch(x)) for x in values["saved"]
        ):
            raise ValueError(f"it names other files as saved: {str(values['saved'])[:80]}")
        # which those of earlier versions do not hold
        micro_batches = values.get("micro_batches", 1)
        if type(micro_batches) is not int or micro_batches < 1:
            raise ValueError("it counts no micro-batches")
        if not isinstance(values["saved_loss"], (int, float)):
            raise TypeError("saved_loss is no number")
        progress = values["run"]["progress"]
        if (
            progress["step"] != values["step"]
            or min(*progress.values(), *values["logs"].values()) < 0
        ):
            raise ValueError("its progress is none that a run makes")


def foreign_in_one_line(folder: Path) -> AbstractContextManager[None]:
    """Makes one CheckpointError of whatever values of a wrong form lead to."""
    return damage_in_one_line(folder, "holds what no run writes")


def _require(found: Any, wanted: Any, where: str) -> None:
    kinds = (int, float) if isinstance(wanted, float) else type(wanted)
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise TypeError(f"{where} is no {type(wanted).__name__}")
    if isinstance(found, dict):
        for key, value in wanted.items():
            if key not in found:
                raise KeyError(f"{where} has no {key}")
            _require(found[key], value, key)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of a type that a setting may have."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, x) for x in inner)
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in inner)
    if origin is dict:
        return isinstance(value, dict)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(x, inner[0]) for x in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint or (hint is Any)
