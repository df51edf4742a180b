"""What a path on the command line is, and what to load for it: one habit of all commands.

People have a model, an adapter, a state, or the folder of a run. Each may stand where a command
takes a model; what else is needed is found beside it.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.printing import print_line
from rwkv_peft.recognise import JSON, OLD_TORCH, SAFETENSORS, TEXT, TORCH, recognise

T = TypeVar("T")
Kind = Literal["model", "adapter", "state", "run", "checkpoint", "other"]
# bytes of a file in the old format of torch.save, which is read whole, up to which it is looked at
LOOKED_AT = 1 << 28
_RESULT = re.compile(r"rwkv-(\d+)(-adapter|\.pth|-.+\.pth)", re.DOTALL)
_ADAPTER, _BASE = "adapter_config.json", "base_model_name_or_path"
_FILES = (_ADAPTER, "adapter_model.safetensors", "rwkv_peft.json")
_LOGS = ("config.yaml", "train_log.txt", "loss_data.jsonl", "val_data.jsonl", "merge_report.json")
_STEP = re.compile(r"step-(\d+)")
# how a command takes an adapter or a state whose base is not known
_BASES = {
    "train": "rwkv-peft train BASE data.jsonl --load_adapter {path}",
    "merge": "rwkv-peft merge BASE {path} --output merged.pth",
    "convert": "rwkv-peft convert {path} --base_model BASE --output O",
    "eval": "rwkv-peft eval BASE data.jsonl --{kind} {path}",
    "export": "rwkv-peft export {path} --base_model BASE --to gguf",
}


class Parts(NamedTuple):
    """What to load; empty where there is none.

    Attributes:
        run: the folder of the run that wrote the result, None if it is not known.
        note: what was found and is to be said; empty where nothing but the path was taken.
    """

    model: str = ""
    adapter: str = ""
    state: str = ""
    run: Path | None = None
    note: str = ""


def find_kind(path: str | Path) -> Kind:
    """What a file or folder is; 'other' for what is none of them, cannot be read or is missing.

    A file of an adapter's folder stands for the adapter, see `find_whole`.
    """
    path = Path(find_whole(str(path)))
    try:
        if path.is_dir():
            return _kind_of_folder(path)
        if not path.is_file():
            return "other"
        kind = recognise(path)
    except OSError:
        # or no name at all, as a long list of files
        return "other"
    if kind not in (TORCH, OLD_TORCH, SAFETENSORS):
        return "other"
    if kind is OLD_TORCH and path.stat().st_size > LOOKED_AT:
        return "model"
    from rwkv_peft.checkpoint.older import method_of_names
    from rwkv_peft.checkpoint.pth import STATE_SUFFIX, read_weights

    try:
        names = list(read_weights(path))
    except CheckpointError:
        return "other"
    if method_of_names(names):
        return "adapter"
    is_state = bool(names) and all(name.endswith(STATE_SUFFIX) for name in names)
    return "state" if is_state else "model"


def find_whole(path: str) -> str:
    """The folder of an adapter in peft's format for each of its files, all else as it is."""
    given = Path(path)
    is_part = given.name in _FILES and given.is_file() and (given.parent / _ADAPTER).is_file()
    return str(given.parent) if is_part else path


def find_parts(path: str, command: str, *, wants_adapter: bool = False) -> Parts:
    """What to load where a path stands in the place of a model.

    Args:
        command: that it was given to, for messages.
        wants_adapter: of a run the adapter and its base, and not the merged model.
    Raises:
        ConfigError: it is an adapter or a state whose base is not known, or a run without a result.
    """
    path = find_whole(path)
    kind = find_kind(path)
    if kind == "other":
        require_no_log(path, command)
    if kind in ("model", "other"):
        return Parts(model=path)
    if kind in ("run", "checkpoint"):
        return _parts_of_run(Path(path), kind, command, wants_adapter)
    return _with_base(path, kind, command)


def complete(options: T, command: str) -> T:
    """Options of a model in which `load_model` is one; what was found for it is said.

    Args:
        options: a dataclass with `load_model`, `adapter` and `state`.
    Raises:
        ConfigError: what stands for the model cannot be used, or is given twice.
    """
    given: Any = options
    if not given.load_model:
        return options
    for flag in ("adapter", "state"):
        if value := getattr(given, flag):
            line = f"rwkv-peft {command} {given.load_model}"
            found, note = find_added(value, flag, line, kinds=(flag,))
            given = options = replace(options, **{flag: found})  # type: ignore[type-var]
            if note:
                print_line(f"note: {note}", file=sys.stderr)
    parts = find_parts(given.load_model, command)
    for name in ("adapter", "state"):
        if getattr(parts, name) and getattr(given, name):
            raise ConfigError(
                f"{given.load_model} brings {getattr(parts, name)}: leave out --{name} "
                f"{getattr(given, name)}, or give the model itself, {parts.model}"
            )
    changes = {n: x for n in ("adapter", "state") if (x := getattr(parts, n))}
    if parts.note:
        print_line(f"note: {parts.note}", file=sys.stderr)
    completed: T = replace(given, load_model=parts.model, **changes)
    return completed


def find_added(
    path: str, flag: str, line: str, *, kinds: Sequence[str] = ("adapter", "state")
) -> tuple[str, str]:
    """What to load for a path behind a flag of adapters or states, and what is to be said of it.

    Args:
        line: the command line without the flag, for messages.
        kinds: what the flag takes.
    Raises:
        ConfigError: it is something else.
    """
    path, kind, note = find_whole(path), find_kind(path), ""
    if kind in ("run", "checkpoint"):
        result = find_result(Path(path), kind, line, wants_adapter=True)
        note, path = describe_result(Path(path), result), str(result)
        kind = find_kind(path)
    if kind == "model":
        raise ConfigError(
            f"--{flag} {path} is a whole model: it is given alone, as the first argument"
        )
    if kind == "adapter" and kind not in kinds:
        raise ConfigError(f"--{flag} {path} is an adapter: {line} --adapter {path}")
    if kind == "state" and kind not in kinds:
        raise ConfigError(f"--{flag} {path} is a learned state: {line} --state {path}")
    return path, note


def require_model(path: str, command: str) -> None:
    """Raises ConfigError if data stands alone, where a model is to stand before it."""
    if path and Path(path).is_file() and recognise(path) in (JSON, TEXT):
        raise ConfigError(f"no model given: rwkv-peft {command} model.pth {path}")


def require_data(path: str, line: str) -> None:
    """Raises ConfigError if what stands in the place of data is a model or a result of training.

    Args:
        line: with data in its place, for the message.
    """
    kind = find_kind(path) if path else "other"
    if kind != "other":
        what = {"adapter": "an adapter", "run": "the folder of a run"}.get(kind, f"a {kind}")
        raise ConfigError(
            f"{path} is {what} and no data: rwkv-peft inspect {path} says what it holds, and data "
            f"is given as in {line}"
        )


def require_no_log(path: str, command: str) -> None:
    """Raises ConfigError if a file is one that a run writes beside its results."""
    folder = Path(path).parent
    if Path(path).name in _LOGS and _kind_of_folder(folder) == "run":
        raise ConfigError(
            f"{path} is a file of the run {folder}, whose results are used by its folder: "
            f"rwkv-peft {command} {folder}"
        )


def refuse_model(path: str, advice: str) -> NoReturn:
    """Raises an error for what stands in the place of an adapter and is none.

    Raises:
        CheckpointError: it is no file of weights, or missing.
        ConfigError: it is a whole model.
    """
    if find_kind(path) == "other":
        from rwkv_peft.checkpoint.pth import read_weights

        # says what it is
        read_weights(path)
    raise ConfigError(f"{path} is a whole model: {advice}")


def find_run(path: str | Path) -> Path | None:
    """The folder of the run that wrote a file: its own, or two above for an interrupted run's."""
    folders = Path(path).resolve().parents
    return next((f for f in list(folders)[:3] if (f / "config.yaml").is_file()), None)


def _kind_of_folder(path: Path) -> Kind:
    known = ("config.yaml", "config.json", "manifest.json", _ADAPTER, ".run.lock")
    if not any((path / name).is_file() for name in known):
        return "other"
    from rwkv_peft.training.folder import find_holder, read_settings

    if (path / _ADAPTER).is_file():
        return "adapter"
    # others have a manifest.json too
    if (path / "manifest.json").is_file() and (path / "run.json").is_file():
        return "checkpoint"
    if read_settings(path) is not None or find_holder(path):
        return "run"
    return "model" if _is_model_folder(path) else "other"


def _is_model_folder(path: Path) -> bool:
    from rwkv_peft.exports.opened import is_model_folder

    try:
        return is_model_folder(path)
    except CheckpointError:
        return False


def find_result(path: Path, kind: Kind, command: str, *, wants_adapter: bool = False) -> Path:
    """The newest result of a run or of a checkpoint: a merged file or states, or the adapter.

    Args:
        kind: of the path, 'run' or 'checkpoint'.
        wants_adapter: rather than the merged file.
    Raises:
        ConfigError: there is none, or there are several states.
    """
    stem = _newest(path) if kind == "run" else path / "rwkv"
    weights, adapter = Path(f"{stem}.pth"), Path(f"{stem}-adapter")
    found = [adapter] if adapter.is_dir() else []
    if not found or not wants_adapter:
        states = sorted(stem.parent.glob(f"{stem.name}-*.pth")) if stem else []
        found = [weights] if weights.is_file() else [p for p in states if p.is_file()] or found
    if not found:
        from rwkv_peft.training.folder import find_holder

        folder = path if kind == "run" else path.parent.parent
        if holder := find_holder(folder):
            raise ConfigError(
                f"{folder} is the folder of a run that goes on ({holder}) and has saved nothing "
                "yet: wait for its first result"
            )
        what = "the folder of a run" if kind == "run" else "a checkpoint, to go on from"
        raise ConfigError(
            f"{path} is {what}, and holds no result yet: go on with rwkv-peft train --resume auto "
            f"--proj_dir {folder}"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{path} holds several states: give one of them, such as rwkv-peft {command} {found[0]}"
        )
    return found[0]


def _parts_of_run(path: Path, kind: Kind, command: str, wants_adapter: bool) -> Parts:
    result = find_result(path, kind, command, wants_adapter=wants_adapter)
    parts = find_parts(str(result), command)
    return parts._replace(
        run=find_run(result), note=f"{describe_result(path, result)}{describe_base(parts)}"
    )


def describe_result(path: Path, result: Path) -> str:
    """What is said of a result that stands for its run."""
    return f"{path}: its newest result is taken, {result}"


def _newest(folder: Path) -> Path | None:
    """The stem of the newest result of a run: its last epoch, or where it was interrupted."""
    epochs = [int(x[1]) for p in folder.iterdir() if (x := _RESULT.fullmatch(p.name))]
    steps = [
        (int(x[1]), p.with_name("rwkv"))
        for p in folder.glob("checkpoints/step-*/rwkv*")
        if (x := _STEP.fullmatch(p.parent.name))
    ]
    stems = [folder / f"rwkv-{max(epochs)}"] if epochs else []
    stems += [max(steps)[1]] if steps else []
    return max(stems, key=_written, default=None)


def _written(stem: Path) -> float:
    return max(p.stat().st_mtime for p in stem.parent.glob(f"{stem.name}*"))


def _with_base(path: str, kind: Kind, command: str) -> Parts:
    """An adapter or a state with the base that it was trained on."""
    what, bases = "an adapter" if kind == "adapter" else "a state", list(_known_bases(Path(path)))
    for base in bases:
        # a name that leads to another machine is not looked up
        if base and not base.startswith(("\\\\", "//")) and find_kind(base) == "model":
            parts = Parts(base, run=find_run(path), **{kind: path})
            return parts._replace(note=f"{path} is {what}{describe_base(parts)}")
    line = _BASES.get(command, "rwkv-peft {command} BASE --{kind} {path}")
    missing = f" ({bases[0]}, which is not there)" if bases else ""
    raise ConfigError(
        f"{path} is {what}, which needs the model that it was trained on{missing}: "
        + line.format(command=command, kind=kind, path=path)
    )


def describe_base(parts: Parts) -> str:
    """What is said of the base that an adapter or a state is used on, behind that."""
    return f", on its base {parts.model}" if parts.adapter or parts.state else ""


def _known_bases(path: Path) -> Iterator[str]:
    """The names of the base that an adapter's config and its run have noted."""
    import json

    from rwkv_peft.checkpoint.folder import LARGEST_TEXT
    from rwkv_peft.training.folder import read_settings

    config = path / _ADAPTER
    if config.is_file() and config.stat().st_size <= LARGEST_TEXT:
        try:
            values = json.loads(config.read_bytes())
        except (ValueError, RecursionError):
            values = {}
        if isinstance(values, dict) and isinstance(base := values.get(_BASE), str):
            yield base
    if run := find_run(path):
        base = (read_settings(run) or {}).get("load_model", "")
        if isinstance(base, str):
            yield base
