"""From files to documents: reads, tokenises, counts what is left out, and keeps the result."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents, Places, Report
from rwkv_peft.data.encode import TEXT_BLOCK, Chunk, Encoder, encode_all, group_rows
from rwkv_peft.data.files import FileRow, read_rows, read_split
from rwkv_peft.data.forms import FORMS
from rwkv_peft.data.remarks import REMARKS
from rwkv_peft.data.sources import TEXT_TYPES, TOKEN_TYPES, Source, find_sources
from rwkv_peft.data.store import Store, open_store
from rwkv_peft.data.tokenfiles import open_tokens
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.writing import atomic_folder, cache_folder

# bytes of files; fewer are read anew in each run, into memory
CACHED_FROM = 16 << 20
# part of the cache's key: raised when what is written for the same data changes
CACHE_VERSION = 3
# documents of a token file whose last token is looked at
NUM_LOOKED_AT = 10_000
# settings that change what is prepared
_KEYS = ("data_type", "sft_field", "sft_split", "loss_mask", "mask_id", "train_role_words")

Progress = Callable[[int], None]


def read_documents(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    is_checked: bool = False,
) -> Documents:
    """All documents that `config` names, tokenised.

    A lone file of tokens is a memory map, not a copy, unless a mask must be computed. Much text
    becomes a memory map too, in the folder `data_cache`, where later runs find it by its content.

    Args:
        progress: called with the bytes of text that were tokenised since the last call.
        is_checked: whether each document is decoded again and compared with its text.
    Raises:
        ConfigError: a file, the template or the mask does not exist.
        DataError: a row is broken, or there is nothing, or too little, that could be trained.
    """
    found = find_sources(config.data_file, config.data_type)
    sources = [source for source in found if source.share != 0]
    encoder = Encoder(config, tokenizer, is_checked=is_checked)
    documents = _read(sources, encoder, progress)
    notes = [*documents.report.notes, *_note_left_out(found, config)]
    if any(part.kind not in TOKEN_TYPES for source in sources for part in source.parts):
        notes += filter(None, [tokenizer.describe_mismatch()])
    return replace(documents, report=replace(documents.report, notes=tuple(notes)))


def _read(sources: list[Source], encoder: Encoder, progress: Progress | None) -> Documents:
    config, tokenizer = encoder.config, encoder.tokenizer
    if len(sources) == 1 and sources[0].kind in TOKEN_TYPES and encoder.trains_all_text:
        _choose_rows(sources[0], config.sft_split)
        return _map_tokens(sources[0], tokenizer)
    if sum(source.num_bytes for source in sources) < CACHED_FROM:
        store = Store(encoder.dtype)
        _fill(store, sources, encoder, progress)
        return _make_documents(sources, store.arrays(), store.finish(), config)
    folder = Path(config.data_cache or cache_folder("data")) / _fingerprint(sources, encoder)
    if not (folder / "facts.json").exists():
        # of runs that prepare the same data at once the first to finish gives it to all
        with atomic_folder(folder, keeps_first=True) as part:
            # as private as the texts may be
            part.chmod(0o700)
            store = Store(encoder.dtype, part)
            try:
                _fill(store, sources, encoder, progress)
                store.finish()
            finally:
                store.close()
    return _make_documents(sources, *open_store(folder), config)


def _map_tokens(source: Source, tokenizer: Tokenizer) -> Documents:
    tokens, starts = open_tokens(source, tokenizer.vocab_size)
    if len(starts) < 2:
        raise DataError(f"{source.path}: no trainable token: the file holds no document")
    count = len(starts) - 1
    ends = tokens[starts[1 : NUM_LOOKED_AT + 1] - 1]
    return Documents(
        paths=(source.path,),
        tokens=tokens,
        starts=starts,
        lines=np.arange(1, count + 1),
        sources=np.zeros(count, dtype=np.int32),
        report=Report(
            num_rows=count,
            forms={source.kind: count},
            num_endless=int(np.count_nonzero(ends != tokenizer.eod)),
        ),
    )


def _fill(store: Store, sources: list[Source], encoder: Encoder, progress: Progress | None) -> None:
    stops = encoder.config.on_bad_row == "stop"
    num_before = 0
    for source in sources:
        for i, rows in _choose_rows(source, encoder.config.sft_split):
            part = source.parts[i]
            for chunk in _encode(part, rows, encoder):
                if chunk.bad and stops:
                    line, reason = chunk.bad[0]
                    raise DataError(f"{part.path}:{line}: {reason}")
                store.add(chunk, num_before + i, part.path)
                if progress is not None:
                    progress(chunk.num_bytes)
        num_before += len(source.parts)


def _choose_rows(source: Source, split: str) -> Iterable[tuple[int, Iterator[FileRow]]]:
    """The parts of a source that a split names: index of each, and its rows if it has rows.

    Raises:
        ConfigError: the split names nothing, or parts of files that have no rows.
    """
    parts = source.parts
    splits = [part.split for part in parts]
    is_whole = split in splits if source.kind == "folder" else split == "train"
    if not is_whole:
        lacking = next((part for part in parts if part.kind != "rows"), None)
        if lacking is not None:
            raise ConfigError(
                f"--sft_split {split} takes a part of rows, and {lacking.path} has none: leave it "
                "out, or give a smaller file"
            )
        if source.kind == "folder":
            return read_split([part.path for part in parts], splits, split)
        return [(0, read_rows(source.path, split))]
    chosen = [i for i, part in enumerate(parts) if splits[i] == split]
    return ((i, read_rows(parts[i].path) if parts[i].kind == "rows" else iter(())) for i in chosen)


def _note_left_out(sources: list[Source], config: DataConfig) -> Iterator[str]:
    """Lines about what --data_file names and nothing is read of."""
    for source in sources:
        if source.share == 0:
            yield f"{source.path} has share 0, left out"
            continue
        others = [p.path for p in source.members if p.split not in config.sft_split]
        for what, names in (
            ("files that are no data", source.strangers),
            (f"files that --sft_split {config.sft_split} does not name", others),
        ):
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                yield f"{source.path}: {len(names):,} {what}, left out: {shown}"


def _encode(source: Source, rows: Iterator[FileRow], encoder: Encoder) -> Iterator[Chunk]:
    if source.kind in TOKEN_TYPES:
        found = open_tokens(source, encoder.tokenizer.vocab_size)
        yield from encoder.encode_tokens(found)
    elif source.kind in TEXT_TYPES:
        blocks = _read_text(source)
        if encoder.trains_all_text:
            yield from encoder.encode_text(blocks)
        else:
            text = {"text": "".join(blocks)}
            yield encoder.encode_rows([FileRow(1, text)])
    else:
        lists = group_rows(rows)
        yield from encode_all(encoder, lists, encoder.config.prepare_workers)


def _read_text(source: Source) -> Iterator[str]:
    encoding = {"utf-8": "utf-8-sig", "utf-16le": "utf-16-le"}[source.kind]
    try:
        with open(source.path, encoding=encoding, newline="") as file:
            while block := file.read(TEXT_BLOCK):
                yield block.removeprefix("\ufeff") if source.kind == "utf-16le" else block
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.path}: not {source.kind} ({error.reason}): save the file as {source.kind}"
        ) from error


def _fingerprint(sources: list[Source], encoder: Encoder) -> str:
    """A name that changes with the content of the files and with whatever changes the result."""
    config = encoder.config
    parts = [[(part.kind, part.split) for part in source.parts] for source in sources]
    what: list[Any] = [CACHE_VERSION, parts]
    what += [getattr(config, key) for key in (*_KEYS, "append_eod", "on_bad_row")]
    what += [encoder.template.name, getattr(encoder.template, "source", "")]
    what += [encoder.tokenizer.vocab_size, encoder.is_checked]
    digest = hashlib.sha256(json.dumps(what).encode())
    for source in sources:
        for file in source.files:
            digest.update(str(file.stat().st_size).encode())
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:32]


def _make_documents(
    sources: list[Source],
    arrays: dict[str, NDArray[Any]],
    facts: dict[str, Any],
    config: DataConfig,
) -> Documents:
    paths = tuple(part.path for source in sources for part in source.parts)
    report = Report(
        num_rows=facts["num_rows"],
        num_bytes=facts["num_bytes"],
        forms=facts["forms"],
        bad=tuple(facts["bad"]),
        empty=Places(arrays["empty"].reshape(-1, 2)),
        untrained=Places(arrays["untrained"].reshape(-1, 2)),
        duplicates=_find_duplicates(arrays),
        remarks=_group_remarks(arrays["remarks"].reshape(-1, 3)),
    )
    _require_enough(report, paths, len(arrays["sizes"]), config)
    names = np.array(facts["states"])
    return Documents(
        paths=paths,
        tokens=arrays["tokens"],
        starts=np.concatenate([[0], np.cumsum(arrays["sizes"], dtype=np.int64)]),
        lines=arrays["lines"],
        sources=arrays["sources"],
        entries=tuple((source.path, len(source.parts)) for source in sources),
        shares=tuple(s.share for s in sources if s.share is not None) or None,
        weights=arrays.get("weights", arrays.get("mask")),
        states=names[arrays["states"]] if len(names) > 1 else None,
        report=report,
    )


def _find_duplicates(arrays: dict[str, NDArray[Any]]) -> Places:
    digests = arrays["digests"]
    order = np.argsort(digests, kind="stable")
    repeats = np.sort(order[1:][digests[order[1:]] == digests[order[:-1]]])
    sources = arrays["sources"][repeats].astype(np.int64)
    return Places(np.stack([sources, arrays["lines"][repeats]], axis=1))


def _group_remarks(table: NDArray[np.int64]) -> dict[str, Places]:
    places = ((name, table[table[:, 0] == i, 1:]) for i, name in enumerate(REMARKS))
    return {name: Places(found) for name, found in places if len(found)}


def _require_enough(
    report: Report, paths: tuple[str, ...], num_documents: int, config: DataConfig
) -> None:
    where = config.data_file
    if len(report.untrained) > config.max_untrained * (num_documents + len(report.untrained)):
        raise DataError(
            f"{where}: --loss_mask {config.loss_mask} leaves nothing to train in "
            f"{len(report.untrained):,} of {num_documents + len(report.untrained):,} documents, "
            f"the first at {report.untrained.describe(paths, 1)[0]}: look at them "
            "with rwkv-peft data, choose another mask or template, or raise --max_untrained"
        )
    if num_documents:
        return
    counts = {
        "empty": len(report.empty),
        "broken": len(report.bad),
        "masked": len(report.untrained),
    }
    what = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    what = f"{report.num_rows} rows, {what}" if what else "the file is empty"
    raise DataError(f"{where}: no trainable token: {what}; a row is like {FORMS['text'].example}")
