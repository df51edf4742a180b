"""From rows to tokens and loss weights, a chunk at a time, in this process or in several."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.config import DataConfig
from rwkv_peft.data.files import FileRow, parse_json
from rwkv_peft.data.forms import read_row
from rwkv_peft.data.masks import Mask, find_mask, weigh_tokens
from rwkv_peft.data.records import Piece, Record
from rwkv_peft.data.remarks import find_remarks, look_at_text
from rwkv_peft.data.templates import find_template, lay_verbatim
from rwkv_peft.data.tokenfiles import TokenFile, Tokens, cut_blocks
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError

# rows and bytes of a chunk: enough to make passing it between processes cheap
CHUNK_ROWS, CHUNK_BYTES = 1024, 1 << 20
# no token is longer, so that greedy matching looks no further ahead
LONGEST_TOKEN = 128
# characters of what is said of a row that cannot be read
LONGEST_REASON = 1000
# characters of a plain text read at a time
TEXT_BLOCK = 1 << 20

T = TypeVar("T")


class EncodedDocument(NamedTuple):
    """One document as tokens.

    Attributes:
        text: its bytes, in UTF-8 unless a token file says otherwise.
        tokens: (T,) token ids.
        weights: (T,) loss weight of each token as a target; None: all 1.
        form: form of its row, such as messages.
        state: name of the state that it trains, "" for none.
        remarks: names of what a person should know of it, see `remarks`.
    """

    text: bytes
    tokens: Tokens
    weights: NDArray[np.float32] | None
    form: str
    state: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def digest(self) -> int:
        """A 64-bit hash of its text and its state, equal for documents that repeat."""
        text = self.state.encode() + b"\0" + self.text if self.state else self.text
        return _number(_hash(text))


@dataclass(slots=True)
class Chunk:
    """Tokens of several documents, and the rows that gave none; lines count within one file.

    Attributes:
        tokens: end to end; of a document that is too long for one chunk, a part.
        weights: loss weight of each token; None: all 1.
        sizes: tokens of each document that ends in this chunk.
        lines, digests, states, forms: one entry for each of these documents.
        empty: lines of rows without a text.
        untrained: lines of rows in which the mask leaves no token to train.
        remarks: names of remarks, each with the lines of the documents that call for it.
        bad: lines that cannot be read, with the reason.
    """

    tokens: Tokens
    weights: NDArray[np.float32] | None = None
    sizes: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    untrained: list[int] = field(default_factory=list)
    remarks: dict[str, list[int]] = field(default_factory=dict)
    bad: list[tuple[int, str]] = field(default_factory=list)
    num_rows: int = 0
    num_bytes: int = 0


class Encoder:
    """Turns rows into tokens and loss weights as a data configuration says.

    Args:
        is_checked: whether each document is decoded again and compared with its text.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, is_checked: bool = False
    ) -> None:
        self.config, self.tokenizer, self.is_checked = config, tokenizer, is_checked
        self.template = find_template(config.template_name)
        self.mask = find_mask(
            config.loss_mask,
            mask_id=config.mask_id,
            has_heads=bool(config.train_role_words),
            vocabulary=tokenizer.vocabulary,
        )
        self.dtype = np.dtype(np.uint16 if tokenizer.num_tokens <= 1 << 16 else np.int32)

    @property
    def trains_all_text(self) -> bool:
        """Whether every token of a document without turns is trained."""
        return self.mask.is_all or self.mask.skips_plain_text

    @property
    def trains_unasked(self) -> bool:
        """Whether all of a plain text is trained because nothing else was asked for."""
        return self.mask.skips_plain_text

    def encode_rows(self, rows: Iterable[FileRow]) -> Chunk:
        """The documents of rows, and what is wrong with the other rows."""
        return self._collect(rows, self._encode_content)

    def encode_tokens(self, file: TokenFile) -> Iterator[Chunk]:
        """The documents of a token file, whose turns are found in the text of the tokens."""
        tokens = np.asarray(file.tokens)
        for first, last in cut_blocks(file):
            borders = pairwise(file.starts[first : last + 1])
            documents = (tokens[start:end] for start, end in borders)
            yield self._collect(enumerate(documents, first + 1), self._encode_ids)

    def encode_text(self, blocks: Iterable[str]) -> Iterator[Chunk]:
        """The one document that blocks of text are together, tokenised as if read at once."""
        held, size, digest = "", 0, _hash()
        remarks: dict[str, list[int]] = {}
        for block in blocks:
            held += block
            # its first block shows whether a text is a dialogue
            is_start = self.trains_unasked and not size
            remarks |= {name: [1] for name in look_at_text(block, trains_all_text=is_start)}
            ids, rest = self._encode_settled(held)
            data = held[: len(held) - len(rest)].encode()
            held = rest
            size += len(ids)
            digest.update(data)
            yield Chunk(np.array(ids, dtype=self.dtype), num_bytes=len(data))
        if not size and not held:
            yield Chunk(np.zeros(0, dtype=self.dtype), num_rows=1, empty=[1])
            return
        ids = self.tokenizer.encode(held)
        ids += [self.tokenizer.eod] if self.config.append_eod else []
        digest.update(held.encode())
        yield Chunk(
            np.array(ids, dtype=self.dtype),
            sizes=[size + len(ids)],
            lines=[1],
            digests=[_number(digest)],
            states=[""],
            forms=["text"],
            remarks=remarks,
            num_rows=1,
            num_bytes=len(held.encode()),
        )

    def encode_record(self, record: Record) -> EncodedDocument:
        """The document of a record.

        Raises:
            DataError: its turns do not fit the template, or its text is not Unicode.
        """
        pieces: list[Piece] | None = None
        mask = Mask() if self.mask.skips_plain_text and not record.turns else self.mask
        if record.turns:
            lay = lay_verbatim if record.is_verbatim else self.template.render
            pieces = lay(record.turns)
            text = "".join(piece.text for piece in pieces)
        else:
            text = record.text
        ids = self.tokenizer.encode(text)
        data = text.encode()
        if self.is_checked and self.tokenizer.decode_bytes(ids) != data:
            raise DataError("the tokens do not decode to the text again")
        if self.config.append_eod:
            ids.append(self.tokenizer.eod)
        tokens = np.array(ids, dtype=self.dtype)
        if pieces is None:
            pieces = [] if mask.is_all else self._parse_turns(text, mask)
        weights = self._weigh(tokens, pieces, mask)
        if record.weight != 1:
            weights = np.ones(len(ids), np.float32) if weights is None else weights
            weights = weights * np.float32(record.weight)
        return EncodedDocument(data, tokens, weights, record.form, record.state)

    def _collect(
        self, rows: Iterable[tuple[int, T]], encode: Callable[[T], EncodedDocument | None]
    ) -> Chunk:
        """The chunk of numbered rows; `encode` gives None for a row without a text."""
        chunk = Chunk(np.zeros(0, dtype=self.dtype))
        kept: list[EncodedDocument] = []
        for line, row in rows:
            chunk.num_rows += 1
            try:
                document = encode(row)
            except DataError as error:
                # names and values of a row in it may be of any length
                reason = str(error)
                reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} …"
                chunk.bad.append((line, reason))
                continue
            if document is None:
                chunk.empty.append(line)
            elif document.weights is not None and not document.weights[1:].any():
                chunk.untrained.append(line)
            else:
                chunk.lines.append(line)
                kept.append(document)
                for remark in document.remarks:
                    chunk.remarks.setdefault(remark, []).append(line)
        chunk.tokens = np.concatenate([chunk.tokens, *(document.tokens for document in kept)])
        chunk.weights = _join_weights(kept)
        chunk.sizes = [len(document.tokens) for document in kept]
        chunk.digests = [document.digest for document in kept]
        chunk.states = [document.state for document in kept]
        chunk.forms = [document.form for document in kept]
        chunk.num_bytes = sum(len(document.text) for document in kept)
        return chunk

    def _encode_content(self, content: object) -> EncodedDocument | None:
        if isinstance(content, DataError):
            raise content
        row = parse_json(content) if isinstance(content, bytes) else content
        record = read_row(row, self.config.data_type, self.config.sft_field)
        if record.is_empty:
            return None
        remarks = find_remarks(row, record, trains_all_text=self.trains_unasked)
        return self.encode_record(record)._replace(remarks=tuple(remarks))

    def _encode_ids(self, ids: Tokens) -> EncodedDocument:
        data = self.tokenizer.decode_bytes(ids.tolist())
        weights = None
        if not self.trains_all_text:
            text = data.decode("utf-8", errors="surrogateescape")
            weights = self._weigh(ids, self._parse_turns(text, self.mask), self.mask)
        return EncodedDocument(data, ids, weights, "tokens")

    def _parse_turns(self, text: str, mask: Mask) -> list[Piece]:
        return [Piece(text, "", "body")] if mask.marks else self.template.parse(text)

    def _weigh(self, ids: Tokens, pieces: list[Piece], mask: Mask) -> NDArray[np.float32] | None:
        if mask.is_all and all(piece.weight == 1 for piece in pieces):
            return None
        spans, weight_of_end = mask.find_spans(pieces)
        weights = weigh_tokens(ids, self.tokenizer.token_sizes, spans)
        if ids[-1] == self.tokenizer.eod:
            weights[-1] = weight_of_end
        return weights

    def _encode_settled(self, text: str) -> tuple[list[int], str]:
        """Tokens of the start of a text that no text behind it can change, and the rest."""
        data = text.encode()
        ids = self.tokenizer.encode(text)
        ends = np.cumsum(self.tokenizer.token_sizes[ids]) if ids else np.zeros(0, dtype=np.int64)
        count = int(np.searchsorted(ends, len(data) - LONGEST_TOKEN, side="right"))
        # a token may end inside a character, where a text cannot be cut
        while count and ends[count - 1] < len(data) and data[ends[count - 1]] & 0xC0 == 0x80:
            count -= 1
        end = int(ends[count - 1]) if count else 0
        return ids[:count], data[end:].decode()


# of eight bytes, so that a digest is a number of 64 bits
_hash = partial(blake2b, digest_size=8)


def _number(digest: blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def _join_weights(documents: list[EncodedDocument]) -> NDArray[np.float32] | None:
    if all(document.weights is None for document in documents):
        return None
    filled = [
        np.ones(len(document.tokens), dtype=np.float32)
        if document.weights is None
        else document.weights
        for document in documents
    ]
    return np.concatenate(filled)


def group_rows(rows: Iterable[FileRow]) -> Iterator[list[FileRow]]:
    """Rows in lists that are long enough to be worth passing to another process."""
    held: list[FileRow] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row.content) if isinstance(row.content, bytes) else 1024
        if len(held) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def encode_all(
    encoder: Encoder, lists: Iterable[list[FileRow]], num_workers: int
) -> Iterator[Chunk]:
    """The chunks of lists of rows in their order, encoded by so many processes.

    There is at most one process a core, since more would only take memory.

    Raises:
        DataError: a process died.
    """
    num_workers = min(num_workers, os.cpu_count() or 1)
    if num_workers <= 1:
        yield from map(encoder.encode_rows, lists)
        return
    from collections import deque
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    waiting: deque[Future[Chunk]] = deque()
    setting = (encoder.config, encoder.tokenizer, encoder.is_checked)
    with ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=_start_worker, initargs=setting
    ) as pool:
        try:
            for rows in lists:
                waiting.append(pool.submit(_encode_in_worker, rows))
                # a few for each process, so that none waits and memory stays flat
                if len(waiting) >= 3 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {num_workers} processes that tokenise has died, killed or out of memory: "
                "use a smaller --prepare_workers; a Python script that calls this needs "
                "if __name__ == '__main__'"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Callable[[list[FileRow]], Chunk] | None = None


def _start_worker(config: DataConfig, tokenizer: Tokenizer, is_checked: bool) -> None:
    global _worker
    _worker = Encoder(config, tokenizer, is_checked=is_checked).encode_rows


def _encode_in_worker(rows: list[FileRow]) -> Chunk:
    assert _worker is not None
    return _worker(rows)
