"""Files of rows: each kind gives its rows one after the other; all but .json in little memory."""

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_peft.errors import ConfigError, DataError, RwkvPeftError


class FileRow(NamedTuple):
    """One row as it stands in its file.

    Attributes:
        line: its line in a file of lines (jsonl, csv), otherwise its number; from 1.
        content: the bytes of a line of jsonl, a value that was read, or what is wrong with the row.
    """

    line: int
    content: object


def read_rows(path: str | Path, split: str = "train") -> Iterator[FileRow]:
    """The rows of a file, or of a folder that Hugging Face datasets saved.

    A row that is broken comes as the error that says why; what makes the rest unreadable is raised.

    Args:
        split: which rows, as Hugging Face datasets writes it: 'train', 'train[:1000]'.
    Raises:
        DataError: the file cannot be read any further.
        ConfigError: the split names no rows.
    """
    path = Path(path)
    read = _read_datasets if path.is_dir() else READERS.get(path.suffix.lower(), read_jsonl)
    if read is _read_datasets:
        return _read_datasets(path, split)
    if split == "train":
        return read(path)
    return (row for _, rows in read_split([path], ["train"], split) for row in rows)


def read_split(
    paths: Sequence[str | Path], splits: Sequence[str], wanted: str
) -> Iterator[tuple[int, Iterator[FileRow]]]:
    """The rows that a split names in files that are one data set: index of a file, and its rows.

    Args:
        splits: the split that each file belongs to.
        wanted: such as train[10%:20%].
    Raises:
        ConfigError: the split names no rows.
    """
    counts = [sum(1 for _ in read_rows(path)) for path in paths]
    sizes = dict.fromkeys(splits, 0)
    for own, count in zip(splits, counts, strict=True):
        sizes[own] += count
    for name, first, last in _parse_split(wanted, sizes):
        before = 0
        for i, count in enumerate(counts):
            if splits[i] == name:
                start, end = max(first - before, 0), min(last - before, count)
                if start < end:
                    yield i, itertools.islice(read_rows(paths[i]), start, end)
                before += count


def is_saved_by_datasets(folder: Path) -> bool:
    """Whether a folder is what save_to_disk of Hugging Face datasets wrote."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def read_jsonl(path: str | Path) -> Iterator[FileRow]:
    """The lines of a file, without its byte order mark; blank lines are passed over."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if raw.strip():
                yield FileRow(line, raw)


def parse_json(raw: bytes) -> object:
    """The value of a line of JSON.

    Raises:
        DataError: it is not UTF-8 or not JSON.
    """
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg} at column {error.colno}); every line must be like "
            '{"text": "..."}'
        ) from error
    except RecursionError as error:
        raise DataError("not usable JSON: it is nested too deeply") from error
    except ValueError as error:  # an integer of too many digits
        raise DataError(f"not usable JSON: {error}") from error


def _read_json(path: Path) -> Iterator[FileRow]:
    """The members of one JSON array, which is held in memory; or the lines of a jsonl file."""
    with open(path, "rb") as file:
        start = file.read(1 << 20).removeprefix(codecs.BOM_UTF8).lstrip()
    return _read_array(path) if start[:1] == b"[" else read_jsonl(path)


def _read_array(path: Path) -> Iterator[FileRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}): save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not one JSON array: {error}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; too many digits
        raise DataError(f"{path}: not usable JSON: {error}") from error
    yield from map(FileRow, itertools.count(1), rows)


def _read_csv(path: Path) -> Iterator[FileRow]:
    """The rows of a table whose first row names the columns."""
    csv.field_size_limit(1 << 30)
    # bytes that are not UTF-8 pass as lone surrogates, so that they spoil their own row alone
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(
            file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield FileRow(line, DataError(f"not CSV ({error})"))
                continue
            if not values:
                continue
            if names is None:
                names = values
                twice = next((n for n in filter(None, names) if names.count(n) > 1), "")
                if twice:
                    raise DataError(
                        f"{path}: two columns are called {twice[:100]!r}, of which one would be "
                        "lost: rename one"
                    )
            else:
                yield FileRow(line, _name_values(names, values))


def _name_values(names: list[str], values: list[str]) -> dict[str, Any] | DataError:
    if len(values) != len(names):
        return DataError(f"{len(values)} values for {len(names)} columns")
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        return DataError("not UTF-8: save the file as UTF-8")
    return dict(zip(names, values, strict=True))


def _read_datasets(path: Path, split: str = "train") -> Iterator[FileRow]:
    """The rows of what Hugging Face datasets opens; its cache keeps memory flat."""
    datasets = import_datasets()
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            kind = path.suffix.lower().removeprefix(".")
            found = datasets.load_dataset(kind, data_files={"train": str(path)})
        held = found if isinstance(found, dict) else {"train": found}
        parts = _parse_split(split, {name: len(rows) for name, rows in held.items()})
        for name, first, last in parts:
            number = itertools.count(first + 1)
            for batch in held[name].select(range(first, last)).iter(batch_size=256):
                for values in zip(*batch.values(), strict=True):
                    row = dict(zip(batch, map(_drop_absent, values), strict=True))
                    yield FileRow(next(number), row)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        if isinstance(error, RwkvPeftError):
            raise
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path}: datasets cannot read it as split {split}: {cause}") from error


def import_datasets() -> Any:
    """Hugging Face datasets, quiet.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "parquet and arrow files, folders and splits are read by Hugging Face datasets: "
            "pip install 'rwkv-peft[data]'"
        ) from error
    datasets.disable_progress_bars()
    # it logs what its exceptions say as well
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _drop_absent(value: object) -> object:
    """A value without the keys that its row did not have.

    Arrow gives every object of a column the keys of all of them, with null for those that one
    lacks, so that absent and null cannot be told apart there.
    """
    if isinstance(value, dict):
        return {key: _drop_absent(x) for key, x in value.items() if x is not None}
    return [_drop_absent(x) for x in value] if isinstance(value, list) else value


def _parse_split(split: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Name and rows [first, last) of each part that `split` names in data sets of these sizes."""
    instruction = import_datasets().ReadInstruction
    try:
        parts = instruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"--sft_split {split}: there is {', '.join(sizes)}, and parts of it such as "
            f"train[:1000] or train[10%:20%]: {error}"
        ) from error
    sides = [(p.splitname, p.from_ or 0, p.to) for p in parts]
    found = [(n, first, sizes[n] if last is None else last) for n, first, last in sides]
    if any(sizes.values()) and not any(first < last for _, first, last in found):
        held = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"--sft_split {split} names no rows; there are, by split: {held}")
    return [(n, first, max(first, last)) for n, first, last in found]


# how a file of rows is read, by its ending; a file with another ending is read as jsonl
READERS: dict[str, Callable[[Path], Iterator[FileRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_datasets,
    ".arrow": _read_datasets,
}
