"""Documents kept aside from training: of files of their own, or chosen by what they say."""

from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents, Report
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.sources import find_sources
from rwkv_peft.data.tokenizer import EOD, Tokenizer
from rwkv_peft.errors import ConfigError


def read_held_out(
    config: DataConfig, val_file: str, tokenizer: Tokenizer, trained: Documents
) -> Documents:
    """The documents of files that are kept aside, read as those of training are.

    Of a folder that names a validation split it is that split; shares have no meaning here.

    Raises:
        ConfigError: a file does not exist, or documents begin in states that are not trained.
        DataError: a row is broken, or in no document is anything trained.
    """
    parts = [p for x in find_sources(val_file, config.data_type, flag="val_file") for p in x.parts]
    split = "validation" if any(part.split == "validation" for part in parts) else "train"
    config = replace(config, data_file=val_file, sft_split=split)
    documents = read_documents(config, tokenizer)
    if strangers := (documents.names or {""}) - (trained.names or {""}):
        raise ConfigError(
            f"--val_file {val_file} has rows for {_name_state(min(strangers))}, for which "
            "--data_file has none: give each row a state that is trained"
        )
    notes = (*documents.report.notes, *_note_repeats(documents, trained))
    return replace(documents, shares=None, report=replace(documents.report, notes=notes))


def split_documents(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """Documents to train and about so large a share of them kept aside, at least one text.

    A document stands on the side that a hash of its text tells: equal texts stand together, and
    whatever is added to the data or drawn from another seed, each stays where it is.

    Raises:
        ConfigError: nothing could be trained or kept aside.
    """
    indices = documents.indices
    hashes = _hash_texts(documents, indices)
    if len(np.unique(hashes)) < 2:
        raise ConfigError(
            f"--val_split {share}: the data is one document, or one again and again: split it "
            "into rows, or give a --val_file"
        )
    is_held_out = hashes < min(int(share * 2**64), 2**64 - 1)
    if not is_held_out.any():
        is_held_out = hashes == hashes.min()
    if is_held_out.all():
        is_held_out = hashes != hashes.max()
    trained = replace(documents, chosen=indices[~is_held_out])
    held_out = replace(documents, chosen=indices[is_held_out], shares=None, report=Report())
    _require_all_sides(documents, trained, held_out, share)
    return trained, held_out


def _require_all_sides(
    documents: Documents, trained: Documents, held_out: Documents, share: float
) -> None:
    """Raises ConfigError if a file of a mixture, or a state, has lost all that it would train."""
    lost = [
        name
        for (name, before), (_, after) in zip(documents.groups, trained.groups, strict=True)
        if len(before) and not len(after)
    ]
    lost += [_name_state(name) for name in sorted(held_out.names - trained.names)]
    if lost:
        raise ConfigError(
            f"--val_split {share} would leave nothing to train of {lost[0]}: give a --val_file"
        )


def _name_state(name: str) -> str:
    return f"the state '{name}'" if name else "no state"


def _note_repeats(documents: Documents, trained: Documents) -> list[str]:
    """A line if documents that are kept aside are trained all the same."""
    # few documents of training have the size of one of these
    candidates = trained.indices[np.isin(trained.sizes, documents.sizes)]
    repeats = np.isin(_hash_texts(documents, documents.indices), _hash_texts(trained, candidates))
    if not repeats.any():
        return []
    first = documents.where(int(documents.indices[repeats.argmax()]))
    return [
        f"{repeats.sum():,} documents of --val_file are in --data_file too, and trained, the first "
        f"at {first}"
    ]


def _hash_texts(documents: Documents, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64-bit hashes of texts by their tokens, the end-of-document token left out."""
    hashes = np.empty(len(indices), dtype=np.uint64)
    for i, index in enumerate(indices.tolist()):
        tokens = documents.tokens[documents.starts[index] : documents.starts[index + 1]]
        if tokens[-1] == EOD:
            tokens = tokens[:-1]
        digest = blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest()
        hashes[i] = int.from_bytes(digest, "little")
    return hashes
