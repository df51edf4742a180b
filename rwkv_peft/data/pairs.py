"""Writing documents as a binidx pair."""

from pathlib import Path

import numpy as np

from rwkv_peft.data.documents import Documents
from rwkv_peft.data.sources import Source
from rwkv_peft.data.tokenfiles import mark_tokens, open_tokens, write_index
from rwkv_peft.errors import DataError
from rwkv_peft.writing import atomic_files

BLOCK = 1 << 20


def write_pair(path: Path, documents: Documents, copies: int = 1, seed: int = 0) -> int:
    """Writes `path`.bin and `path`.idx, reads both again, and gives the number of tokens.

    Args:
        copies: how often all documents are written; if more than once, each time in a new order.
        seed: of these orders.
    Raises:
        CheckpointError: they cannot be written; a pair of that name stays as it was.
        DataError: what was read again is not what was written.
    """
    tokens_file, index_file = (path.with_name(path.name + ending) for ending in (".bin", ".idx"))
    sizes = np.diff(documents.starts)
    orders = [np.arange(len(documents))]
    if copies > 1:
        generator = np.random.default_rng(seed)
        orders = [generator.permutation(len(documents)) for _ in range(copies)]
    dtype = documents.tokens.dtype
    sums = []
    with atomic_files(tokens_file, index_file) as (file, index):
        write_index(index, np.concatenate([sizes[order] for order in orders]), dtype)
        for order in orders:
            if copies == 1:
                for start in range(0, len(documents.tokens), BLOCK):
                    block = documents.tokens[start : start + BLOCK]
                    sums.append(int(block.sum()))
                    file.write(block.tobytes())
                continue
            for i in order:
                document = documents.tokens[documents.starts[i] : documents.starts[i + 1]]
                sums.append(int(document.sum()))
                file.write(document.tobytes())
        file.flush()
        index.write(mark_tokens(file.name))
    tokens, starts = open_tokens(Source(str(path), "binidx"), 1 << 31)
    total = sum(int(tokens[i : i + BLOCK].sum()) for i in range(0, len(tokens), BLOCK))
    if len(starts) - 1 != len(documents) * copies or total != sum(sums):
        raise DataError(f"{path}.bin: what was written cannot be read again: is the disk sound?")
    return len(tokens)
