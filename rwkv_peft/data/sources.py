"""Which files a run reads, and of what kind each is."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_peft.data.files import READERS, is_saved_by_datasets
from rwkv_peft.errors import ConfigError
from rwkv_peft.recognise import recognise
from rwkv_peft.writing import restore_files

# what --data_type may name that is not a form of rows: files of tokens, and plain text
TOKEN_TYPES = ("binidx", "numpy", "uint16")
TEXT_TYPES = ("utf-8", "utf-16le")
_TYPE_OF = {".npy": "numpy", ".txt": "utf-8"}
# what is read of a folder; dataset_infos.json describes a data set and holds no row of it
_ENDINGS = (*READERS, *_TYPE_OF, ".bin", ".idx")
_NOT_DATA = ("dataset_infos.json",)
# words in the names of files that name a split, as Hugging Face datasets knows them
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class Source(NamedTuple):
    """One file or folder of data.

    Attributes:
        path: as it can be opened; of a binidx pair without the ending.
        kind: binidx, numpy, uint16, utf-8, utf-16le, rows, or folder.
        share: its part in a mixture, None if none is given; what has share 0 is not read.
        split: the split that a file in a folder belongs to.
        members: of a folder, the files that are read, in the order of their names.
        strangers: of a folder, the names of the files that are of no kind of data.
    """

    path: str
    kind: str
    share: float | None = None
    split: str = "train"
    members: tuple["Source", ...] = ()
    strangers: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple["Source", ...]:
        """The files that are read one after the other: those of a folder, or this one."""
        return self.members if self.kind == "folder" else (self,)

    @property
    def files(self) -> list[Path]:
        """The files that hold its bytes."""
        if self.kind == "folder":
            return [file for part in self.parts for file in part.files]
        path = Path(self.path)
        if self.kind == "binidx":
            return [Path(f"{self.path}.bin"), Path(f"{self.path}.idx")]
        return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(file.stat().st_size for file in self.files)


def find_sources(
    data_file: str, data_type: str = "auto", *, flag: str = "data_file"
) -> list[Source]:
    """The files of --data_file: one, or several as a.jsonl,b.jsonl or a.jsonl:0.7,b.jsonl:0.3.

    An ending may be left out: of the pair of binidx, with _text_document too, and .jsonl. A folder
    stands for its files, each of the kind that its ending tells.

    Args:
        flag: that names them, for messages.
    Raises:
        ConfigError: a file is missing, a folder holds none, or some files have shares and others
            none.
    """
    if not data_file:
        raise ConfigError("no data given: rwkv-peft train model.pth data.jsonl")
    try:
        return _find_sound(data_file, data_type)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--data_file", f"--{flag}", 1)) from error


def _find_sound(data_file: str, data_type: str) -> list[Source]:
    sources = list(_find_each(data_file, data_type))
    for source in sources:
        _require_kind(source)
    given = [source.share for source in sources if source.share is not None]
    if given and len(given) < len(sources):
        raise ConfigError(
            f"--data_file {data_file}: give every file a share, as in a.jsonl:0.7,b.jsonl:0.3, or "
            "none"
        )
    if given and not sum(given) > 0:
        raise ConfigError(f"--data_file {data_file}: the shares add up to nothing")
    return sources


def _require_kind(source: Source) -> None:
    """Raises ConfigError if a file of data is something else by its first bytes."""
    allowed = {"text", "json", "utf-16", "unknown", "empty", "folder", "special"}
    ending = Path(source.path).suffix.lower()
    allowed |= {source.kind, ending.removeprefix(".") if ending in _ENDINGS else ""}
    allowed |= {"html"} if source.kind in TEXT_TYPES else set()
    for file in source.files if source.kind == "binidx" else [Path(source.path)]:
        kind = recognise(file)
        # raw tokens may begin like anything but these words
        is_raw = source.kind in ("binidx", "uint16") and kind.name not in ("lfs", "annex")
        if kind.name not in allowed and not is_raw:
            raise ConfigError(f"--data_file {file} is {kind.what}: {kind.advice}")


def _find_each(data_file: str, data_type: str) -> Iterator[Source]:
    if whole := _find(data_file, data_type):
        yield whole
        return
    for part in data_file.split(","):
        if not part.strip():
            raise ConfigError(f"--data_file {data_file}: there is no name beside a comma")
        name, colon, number = part.strip().rpartition(":")
        found, share = _find(part.strip(), data_type), None
        if not found and colon:
            try:
                share = float(number)
            except ValueError:
                share = -1.0
            found = _find(name, data_type)
            if found and not 0 <= share < float("inf"):
                raise ConfigError(
                    f"--data_file {part}: a share is a number not below 0, got {number}"
                )
        if not found:
            raise ConfigError(f"--data_file: there is no file {part.strip()}")
        yield found._replace(share=share)


def _find(name: str, data_type: str) -> Source | None:
    if not name:
        return None
    path = Path(name)
    try:
        path.exists()
    except OSError:
        # a list of several may be longer than any name
        return None
    kind = data_type if data_type in (*TOKEN_TYPES, *TEXT_TYPES) else ""
    stem = name.removesuffix(path.suffix) if path.suffix in (".bin", ".idx") else name
    # a file of exactly this name comes before a pair, unless --data_type asks for the pair
    if kind == "binidx" or (not kind and (stem != name or not path.exists())):
        for pair in (stem, f"{stem}_text_document"):
            files = Path(f"{pair}.bin"), Path(f"{pair}.idx")
            restore_files(*files)
            if all(file.is_file() for file in files):
                return Source(pair, "binidx")
    if stem != name and path.exists() and kind in ("", "binidx"):
        raise ConfigError(
            f"--data_file {name}: a binidx pair needs {stem}.bin and {stem}.idx, one is missing; "
            "raw tokens are --data_type uint16"
        )
    if kind == "binidx":
        return None
    for found in (path, path.with_name(path.name + ".jsonl") if path.name else path):
        if found.is_dir() and not is_saved_by_datasets(found):
            return _list_folder(found, data_type, takes_all=bool(kind))
        if found.exists():
            by_ending = (
                _TYPE_OF.get(found.suffix.lower(), "rows") if data_type == "auto" else "rows"
            )
            return Source(str(found), kind or by_ending)
    return None


def _list_folder(folder: Path, data_type: str, *, takes_all: bool) -> Source:
    """A folder as its files: those of known endings, or all if --data_type says what they are."""
    members, strangers = {}, []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        is_data = path.suffix.lower() in _ENDINGS and path.name not in _NOT_DATA
        is_read = (path.is_file() and (is_data or takes_all)) or is_saved_by_datasets(path)
        found = _find(str(path), data_type) if is_read else None
        if found is None:
            strangers.append(name)
        else:
            # both files of a pair give the same source
            members[found.path] = found._replace(split=_find_split(name))
    if not members:
        shown = ", ".join(strangers[:5]) or "nothing"
        raise ConfigError(
            f"--data_file: the folder {folder} holds no file of data, only {shown}: endings are "
            + ", ".join(_ENDINGS)
        )
    return Source(
        str(folder), "folder", members=tuple(members.values()), strangers=tuple(strangers)
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Files at any depth by their names, and folders that datasets saved; nothing hidden.

    A link to a folder is given as it is: what it leads to may hold the link itself.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink() and not is_saved_by_datasets(path):
            yield from _walk(path)
        else:
            yield path


def _find_split(name: str) -> str:
    """The split that a word in the name of a file, or of a folder around it, tells."""
    words = re.split(r"[-._ 0-9/]+", name)
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")
