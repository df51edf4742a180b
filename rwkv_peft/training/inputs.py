"""What a run reads, which is never what it writes, and which stays what it was."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_peft.config import TrainConfig
from rwkv_peft.data.sources import find_sources
from rwkv_peft.errors import ConfigError
from rwkv_peft.guard import find_clash

# what a run writes whatever its epochs; its template is copied, if at all, onto itself
_FIXED = ["config.yaml", "train_log.txt", "loss_data.jsonl", "merge_report.json", "checkpoints"]
_FIXED += ["val_data.jsonl", "val_samples.jsonl"]
# the weights, state or adapter of an epoch, or of the best evaluation
_OF_EPOCH = re.compile(r"rwkv-(best|0|[1-9]\d*)(|-.+?)(\.pth|-adapter)", re.IGNORECASE)


class FileMark(NamedTuple):
    """What tells that a file was replaced or changed."""

    device: int
    inode: int
    size: int
    changed_at: int


def mark_file(path: str | Path) -> FileMark:
    """What a file is now."""
    found = os.stat(path)
    return FileMark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def find_change(path: str | Path, mark: FileMark) -> str:
    """What happened to a file since it was marked, for a person; empty if nothing did."""
    try:
        now = mark_file(path)
    except OSError as error:
        return f"{path} cannot be read any more ({error.strerror})"
    if (now.device, now.inode) != (mark.device, mark.inode):
        return f"{path} was replaced by another file"
    return "" if now == mark else f"{path} was changed"


def find_inputs(config: TrainConfig) -> list[Path]:
    """The files and folders that a run reads."""
    names = [config.load_model, config.load_adapter, str(config.peft_config.get("pissa_init", ""))]
    sources = find_sources(config.data_file, config.data_type)
    if config.val_file:
        sources += find_sources(config.val_file, config.data_type, flag="val_file")
    data = [file for source in sources for file in source.files]
    names += [config.template] if Path(config.template).is_file() else []
    names += [config.val_prompts]
    return [Path(name) for name in names if name] + data


def list_outputs(config: TrainConfig, folder: str | Path) -> Iterator[Path]:
    """The files and folders in a run's folder that are there already and that it would write over.

    Other names that a file system takes for the same, as in upper case, count.
    """
    yield from (path for name in _FIXED if (path := Path(folder, name)).exists())
    first, count = config.epoch_begin, config.epoch_count
    last = math.inf if count is None else first + count - 1
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if found := _OF_EPOCH.fullmatch(name):
            epoch, state, ending = found.groups()
            written = Path(folder, f"rwkv-{epoch.lower()}{state}{ending.lower()}")
            is_best = epoch.lower() == "best"
            is_written = config.is_evaluated if is_best else first <= int(epoch) <= last
            if is_written and written.exists():
                yield written


def require_kept_inputs(config: TrainConfig) -> None:
    """Raises ConfigError if a run would write over a file that it reads, by whatever path."""
    folder = config.proj_dir
    if folder and (clash := find_clash(list_outputs(config, folder), find_inputs(config))):
        output, given = clash
        raise ConfigError(
            f"--proj_dir {folder}: the run would write over {output.name} there, which it reads as "
            f"{given}: choose another --proj_dir"
        )


def require_kept_config(config: TrainConfig, files: Iterable[str]) -> None:
    """Raises ConfigError if a file of --config is the user's own, where the run keeps another."""
    folder = Path(config.proj_dir)
    own = folder / "config.yaml"
    if config.proj_dir and not (folder / "train_log.txt").exists() and find_clash([own], files):
        raise ConfigError(
            f"--config {own} lies where the run keeps all its settings under this name: rename it, "
            "or choose another --proj_dir"
        )
