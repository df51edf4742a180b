"""What a file is, by its first bytes, for messages about files that cannot be used as given."""

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# bytes that are looked at
START = 4096
# ends of names that browsers and download managers give to what they have not finished
UNFINISHED = (".crdownload", ".part", ".partial", ".download", ".aria2", ".incomplete")
# the number that begins a file of torch.save before the zip format, as a pickle
_OLD_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# the longest header that safetensors reads
_LONGEST_HEADER = 100_000_000


class Kind(NamedTuple):
    """What a file is.

    Attributes:
        name: for programs: 'torch', 'safetensors', 'text' …, 'unknown'.
        what: for a person, after "is".
        advice: what to do with it, where a file of weights or data is wanted.
    """

    name: str
    what: str
    advice: str = "give another file"


_UNPACK = "unpack it first"
_WEIGHTS = "weights come first, then the data: rwkv-peft train model.pth data.jsonl"
_CONVERTED = "give the .pth or .safetensors that it was converted from"
_ROWS = "give it as the data: rwkv-peft train model.pth data.jsonl"

EMPTY = Kind("empty", "an empty file", "download or copy it again")
LFS = Kind(
    "lfs",
    "a pointer of git-lfs and not the file itself",
    "run git lfs pull, or download the file from its page",
)
ANNEX = Kind("annex", "a pointer of git-annex and not the file itself", "run git annex get")
HTML = Kind(
    "html",
    "a web page that was saved under this name",
    "download the file itself, on Hugging Face by the link with /resolve/ and not /blob/",
)
TORCH = Kind("torch", "a file of torch.save", _WEIGHTS)
OLD_TORCH = Kind("old torch", "a file of torch.save in its old format", _WEIGHTS)
SAFETENSORS = Kind("safetensors", "a safetensors file", _WEIGHTS)
CUT_SAFETENSORS = Kind(
    "cut safetensors", "a truncated safetensors file", "download or copy it again"
)
CUT_ZIP = Kind("cut zip", "truncated", "download or copy it again")
ZIP = Kind("zip", "a zip archive and no file of torch.save", _UNPACK)
SCRIPT = Kind(
    "script",
    "a TorchScript program, which is never run",
    "give a file of its weights: torch.save(model.state_dict(), 'model.pth')",
)
PICKLE = Kind("pickle", "a Python pickle and no file of torch.save", "save it with torch.save")
RWKVQ = Kind("rwkvq", "a quantised file, of rwkv-quant", "give the original .pth")
UTF16 = Kind("utf-16", "a text in UTF-16", "save it as UTF-8")
JSON = Kind("json", "a text file of JSON", _ROWS)
TEXT = Kind("text", "a text file", _ROWS)
UNKNOWN = Kind("unknown", "damaged, or of a format that is not known", "download or copy it again")

# first bytes -> what begins with them; the first that fits
_STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs", LFS),
    (b"/annex/objects/", ANNEX),
    (b"GGUF", Kind("gguf", "a GGUF file, of llama.cpp", _CONVERTED)),
    (b"fmgg", Kind("ggml", "a file of rwkv.cpp or GGML", _CONVERTED)),
    (b"lmgg", Kind("ggml", "a file of rwkv.cpp or GGML", _CONVERTED)),
    (b"PAR1", Kind("parquet", "a parquet file", "it can be data, if it is named .parquet")),
    (b"ARROW1", Kind("arrow", "an arrow file", "it can be data, if it is named .arrow")),
    (b"\x93NUMPY", Kind("numpy", "a numpy array", "it can be data, if it is named .npy")),
    (b"MMIDIDX\0\0", Kind("binidx", "the index of a binidx pair", _ROWS)),
    (b"\x89HDF\r\n", Kind("hdf5", "an HDF5 file")),
    (b"SQLite format 3\0", Kind("sqlite", "an SQLite database")),
    (b"%PDF-", Kind("pdf", "a PDF document")),
    (b"\x1f\x8b", Kind("gzip", "compressed with gzip", _UNPACK)),
    (b"BZh", Kind("bzip2", "compressed with bzip2", _UNPACK)),
    (b"\xfd7zXZ\0", Kind("xz", "compressed with xz", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("zstd", "compressed with zstandard", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("7z", "a 7-Zip archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("rar", "a RAR archive", _UNPACK)),
    (b"\xff\xfe", UTF16),
    (b"\xfe\xff", UTF16),
)


def recognise(path: str | Path) -> Kind:
    """What a file or a folder is.

    Raises:
        OSError: it is missing or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".safetensors"))
        holds = f", such as {found[0]}" if found else ""
        return Kind("folder", "a folder", f"give a file{holds}")
    if path.suffix.lower() in UNFINISHED:
        advice = "let it finish, and give the file by its own name"
        return Kind("unfinished", "an unfinished download", advice)
    if not path.is_file():
        return Kind("special", "no regular file")
    if path.suffix.lower() == ".rwkvq":
        return RWKVQ
    with open(path, "rb") as file:
        start, size = file.read(START), file.seek(0, 2)
    return _by_start(start, size) or (_of_zip(path) if start[:2] == b"PK" else UNKNOWN)


def _by_start(start: bytes, size: int) -> Kind | None:
    """The kind that the first bytes tell, None where they do not."""
    if not start.strip(b"\0"):
        return EMPTY._replace(what="empty, or all zeros") if start else EMPTY
    if found := next((kind for begin, kind in _STARTS if start.startswith(begin)), None):
        return found
    if start[257:262] == b"ustar":
        return Kind("tar", "a tar archive", _UNPACK)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 1 < header <= _LONGEST_HEADER:
        return SAFETENSORS if size >= 8 + header else CUT_SAFETENSORS
    if start[0] == 0x80 and _OLD_TORCH in start[:32]:
        return OLD_TORCH
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return PICKLE
    return _of_text(start)


def _of_text(start: bytes) -> Kind | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        # a letter may be cut in the middle at the end
        text[: max(0, len(text) - 4)].decode("utf-8")
    except UnicodeDecodeError:
        return None
    if b"\0" in text or any(byte < 9 for byte in text):
        return None
    lower = text[:200].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return HTML
    return JSON if text[:1] in (b"{", b"[") else TEXT


def _of_zip(path: Path) -> Kind:
    names: list[str] = []
    refused = suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError)
    with refused, zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if not names:
        return CUT_ZIP
    leaves = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in leaves:
        return SCRIPT
    if "data.pkl" in leaves:
        return TORCH
    if all(name.endswith(".npy") for name in names):
        return Kind("npz", "a .npz archive of numpy", "save its tensors with torch.save")
    return ZIP
