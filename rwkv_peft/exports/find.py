"""What a path that is to be exported stands for: a model, a run, an adapter or a state."""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from rwkv_peft.checkpoint.folder import CONFIG
from rwkv_peft.checkpoint.older import old_method
from rwkv_peft.checkpoint.state import holds_state_alone
from rwkv_peft.errors import CheckpointError

Kind = Literal["model", "adapter", "state"]
_RESULT = re.compile(r"rwkv-(\d+)(\.pth|-adapter)")


class Found(NamedTuple):
    """What was found.

    Attributes:
        base_model: of an adapter; empty for all else.
    """

    kind: Kind
    path: Path
    base_model: str


def find_source(source: str | Path, base_model: str = "") -> Found:
    """What a path stands for; of a run's folder the last epoch, merged if it was.

    Raises:
        CheckpointError: nothing is there, or the model that an adapter needs is not known.
    """
    path = Path(source)
    if path.is_dir() and not (path / CONFIG).is_file() and (result := _last_result(path)):
        path = result
    if path.is_file() and holds_state_alone(path):
        return Found("state", path, "")
    if not (path / CONFIG).is_file() and not old_method(path):
        if base_model:
            raise CheckpointError(f"{path} is a whole model: leave --base_model out")
        return Found("model", path, "")
    return Found("adapter", path, base_model or _noted_base(path))


def _last_result(folder: Path) -> Path | None:
    """The newest epoch of a run; a merged file before the adapter that is in it."""
    found = [(m, p) for p in folder.iterdir() if (m := _RESULT.fullmatch(p.name))]
    ranked = sorted((int(m[1]), m[2] == ".pth", p) for m, p in found)
    return ranked[-1][2] if ranked else None


def _noted_base(path: Path) -> str:
    """The model that an adapter's folder names, if it is there."""
    noted = ""
    if (path / CONFIG).is_file():
        try:
            config = json.loads((path / CONFIG).read_bytes())
            noted = str(config.get("base_model_name_or_path") or "")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / CONFIG} is damaged: {error}") from error
        if noted and Path(noted).exists():
            return noted
    names = f" ({noted}, which is not there)" if noted else ""
    raise CheckpointError(
        f"{path} is an adapter, and needs the model that it was trained on{names}: give "
        "--base_model model.pth"
    )
