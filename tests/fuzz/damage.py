"""Damaging files by chance, and reading what became of them: nothing but our own errors leaves."""

import json
import random
import time
from collections.abc import Callable
from typing import Any

from rwkv_peft.errors import RwkvPeftError

QUICK, FULL = 200, 5000
# seconds that one file may take, and characters of a message
LONGEST, MESSAGE = 10.0, 3000
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 2**31, 10**7, 10**12, 2**63, 10**30, 1e308, float("nan"),
    float("inf"), "", " ", "a", "\ud800", "\0", "\x1b[2J", "../../etc/passwd", "((.*)*)*x", "(",
    "字", [], {}, [[]], [None], [1, "a"], {"a": {}}, {"a": 10**12}, {"": None}, "x" * 5000,
]  # fmt: skip


def spoil(raw: bytes, rng: random.Random, *, at_least: int = 0) -> bytes:
    """Bytes of which some are changed, cut out, doubled, or replaced by others."""
    for _ in range(rng.randrange(at_least, 4)):
        i = rng.randrange(len(raw) + 1)
        j = min(len(raw), i + rng.randrange(1, 40))
        kind = rng.randrange(6)
        if kind == 0:
            raw = raw[:i] + rng.randbytes(rng.randrange(8)) + raw[j:]
        elif kind == 1:
            raw = raw[:i]
        elif kind == 2:
            raw = raw[:i] + raw[i:j] * 2 + raw[j:]
        elif kind == 3:
            raw = raw[:i] + rng.choice([b"\n", b'"', b"[", b"{", b"\0", b"\xff"]) + raw[i:]
        elif kind == 4:
            raw = raw[:i] + raw[j:]
        elif raw:
            i = rng.randrange(len(raw))
            raw = raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1 :]
    return raw


def spoil_value(value: Any, rng: random.Random) -> Any:
    """A value of JSON in which a part has become something else, or is gone, or is new."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: x for k, x in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice(["", "字", "r", "\x1b"]): rng.choice(ODD)}
        return {**value, key: spoil_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], spoil_value(value[i], rng), *value[i + 1 :]]
    return rng.choice(ODD)


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def run(read: Callable[[], object]) -> str:
    """Whether a file was read or refused; anything else fails the test."""
    start = time.perf_counter()
    try:
        read()
        result = "read"
    except RwkvPeftError as error:
        result, message = "refused", str(error)
        assert message.strip() and len(message) < MESSAGE, message[:500]
    assert time.perf_counter() - start < LONGEST
    return result
