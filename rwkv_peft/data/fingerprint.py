"""Which documents a run trains."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.data.documents import Documents

# elements that are converted at a time
_BLOCK = 1 << 20


def hash_documents(documents: Documents | None) -> str:
    """64 hexadecimal digits that differ once a token, border, loss weight or state's name does.

    "" for no documents.

    Files that give the same documents, by whatever names and in whatever format, are the same
    data. About a gigabyte a second.
    """
    if documents is None:
        return ""
    sha256 = hashlib.sha256()
    # of one type each, as a cache may keep them in a narrower one
    arrays: dict[str, tuple[NDArray[Any] | None, str]] = {
        "tokens": (documents.tokens, "<u4"),
        "starts": (documents.starts, "<i8"),
        "sources": (documents.sources, "<i4"),
        "weights": (documents.weights, "<f4"),
    }
    if documents.chosen is not None:
        arrays["chosen"] = (documents.chosen, "<i8")
    for name, (array, dtype) in arrays.items():
        sha256.update(f"{name}{-1 if array is None else len(array)};".encode())
        for start in range(0, 0 if array is None else len(array), _BLOCK):
            assert array is not None
            sha256.update(np.ascontiguousarray(array[start : start + _BLOCK], dtype=dtype).data)
    states = [] if documents.states is None else documents.states.tolist()
    parts = documents.shares and [count for _, count in documents.entries]
    sha256.update(repr((documents.shares, parts, states)).encode())
    return sha256.hexdigest()
