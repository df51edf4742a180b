"""Damage of files, as disks, networks and strangers make it; all of it from a seed."""

import io
import json
import random
import zipfile
from collections.abc import Callable

Mutator = Callable[[bytes, random.Random], bytes]
# values at which lengths, offsets and opcodes go wrong
EDGES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00" * 8, b"\xff" * 8)
NUMBERS = (0, -1, 1, 2, 63, 2**31 - 1, 2**31, 2**62, 2**64, 10**30, 0.5, 1e308, "x", None, [], {})


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, edge values, pieces that are copied, lost, moved or zeroed."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _change_once(data, rng)
    return data


def _change_once(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data) + 1), min(len(data), 1 << rng.randrange(12))
    other, edge = rng.randrange(len(data) + 1), rng.choice(EDGES)
    head, tail, piece = data[:at], data[at:], data[other : other + length]
    match rng.randrange(7):
        case 0:
            return head + bytes(byte ^ 1 << rng.randrange(8) for byte in tail[:1]) + tail[1:]
        case 1:
            return head + edge + tail[len(edge) :]
        case 2:
            return head + rng.randbytes(len(tail[:length])) + tail[length:]
        case 3:
            return head + piece + tail
        case 4:
            return head + piece + tail[length:]
        case 5:
            return head + tail[length:]
    return head + b"\0" * len(tail[:length]) + tail[length:]


def mutate_near(data: bytes, rng: random.Random, start: int, end: int) -> bytes:
    """A change between two places alone."""
    return data[:start] + mutate_bytes(data[start:end], rng) + data[end:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """A file that ends too early, often shortly before its end."""
    return data[: -rng.choice((rng.randrange(1, 200), rng.randrange(1, len(data) + 1)))]


def mutate_directory(data: bytes, rng: random.Random) -> bytes:
    """The list of records at the end of a zip file, which has no checksum."""
    return mutate_near(data, rng, data.rindex(b"PK\1\2") - rng.randrange(2000), len(data))


def damage_record(data: bytes, rng: random.Random) -> bytes:
    """Content of a record, whose checksum stays what it was: the zip file is valid without it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = rng.choice([i for i in archive.infolist() if i.file_size])
    at = info.header_offset
    lengths = data[at + 26 : at + 28], data[at + 28 : at + 30]
    start = at + 30 + sum(int.from_bytes(length, "little") for length in lengths)
    place = start + rng.randrange(info.file_size)
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def resize_record(data: bytes, rng: random.Random) -> bytes:
    """A storage that is too short, too long or empty, in a valid zip file with right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = rng.choice([n for n in archive.namelist() if "/data/" in n])
        content = archive.read(name)
    sizes = (0, 1, len(content) - 1, len(content) // 2, len(content) + 1, 2 * len(content))
    size = rng.choice([size for size in sizes if size != len(content)])
    return rewrite(data, name, (content * 2)[:size])


def mutate_table(data: bytes, rng: random.Random) -> bytes:
    """Another pickled table, in a valid zip file with right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        content = archive.read(name)
    return rewrite(data, name, mutate_bytes(content, rng))


def rewrite(data: bytes, changed: str, content: bytes) -> bytes:
    """A zip file with another content of one record."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename == changed else old.read(info))
    return written.getvalue()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the header of a safetensors file."""
    return mutate_near(data, rng, 0, 8 + int.from_bytes(data[:8], "little"))


def alter_header(data: bytes, rng: random.Random) -> bytes:
    """A header of right JSON and length that says something else of some tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(header))
        entry = header[name]
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            continue
        match rng.randrange(6):
            case 0:
                entry["dtype"] = rng.choice(("F64", "F8_E4M3", "I8", "BOOL", "C64", "X", 5, None))
            case 1:
                entry["shape"] = rng.choice((entry["shape"][::-1], [], [0], rng.choice(NUMBERS)))
            case 2:
                entry["shape"].insert(0, rng.choice(NUMBERS))
            case 3:
                entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
            case 4:
                header[
                    rng.choice(("", "a\0b", "blocks.x.y", "blocks.99999999.y", "emb.weight"))
                ] = header.pop(name)
            case 5:
                del entry[rng.choice(list(entry))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
