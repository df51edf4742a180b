"""From rows to tokens and weights, a chunk at a time, in this process or in several."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.config import DataConfig
from rwkv_peft.data.files import FileRow, parse_json
from rwkv_peft.data.forms import read_row
from rwkv_peft.data.masks import Mask, find_mask, token_weights
from rwkv_peft.data.records import Piece, Record
from rwkv_peft.data.templates import find_template, lay_verbatim
from rwkv_peft.data.tokenfiles import TokenFile, Tokens, blocks
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError

# rows and bytes of a chunk: enough to make passing it between processes cheap
CHUNK_ROWS, CHUNK_BYTES = 1024, 1 << 20
# no token is longer, so that greedy matching looks no further ahead
LONGEST_TOKEN = 128
TEXT_BLOCK = 1 << 20


@dataclass(slots=True)
class Chunk:
    """Tokens of several rows, and what was met on the way; lines are of the rows' file.

    Attributes:
        tokens: end to end; of a document too long for one chunk, a part.
        sizes: tokens of each document that ends here.
        weights: one a token, None if all are 1.
        digests: of each document's text, to find those that repeat.
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
    bad: list[tuple[int, str]] = field(default_factory=list)
    num_rows: int = 0
    num_bytes: int = 0


class Encoder:
    """Turns rows into tokens and weights as a data configuration says.

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
            token_bytes=tokenizer.pieces,
        )
        self.dtype = np.dtype(np.uint16 if tokenizer.num_tokens <= 1 << 16 else np.int32)
        self._lengths = np.zeros(tokenizer.num_tokens, dtype=np.int64)
        for token, piece in tokenizer.pieces.items():
            self._lengths[token] = len(piece)

    @property
    def masks_no_text(self) -> bool:
        """Whether every token of a document without turns is trained."""
        return self.mask.is_all or self.mask.spares_text

    def encode_rows(self, rows: Iterable[FileRow]) -> Chunk:
        """The documents of rows; what is wrong with a row is part of the result."""
        chunk = Chunk(np.zeros(0, dtype=self.dtype))
        tokens: list[NDArray[np.integer]] = []
        weights: list[NDArray[np.float32] | None] = []
        for row in rows:
            chunk.num_rows += 1
            try:
                record = self._record(row)
                if record.is_empty:
                    chunk.empty.append(row.line)
                    continue
                text, ids, document_weights = self.encode(record)
            except DataError as error:
                chunk.bad.append((row.line, str(error)))
                continue
            if document_weights is not None and not document_weights[1:].any():
                chunk.untrained.append(row.line)
                continue
            data = text.encode()
            tokens.append(ids)
            weights.append(document_weights)
            chunk.sizes.append(len(ids))
            chunk.lines.append(row.line)
            chunk.states.append(record.state)
            chunk.forms.append(record.form)
            chunk.num_bytes += len(data)
            key = record.state.encode() + b"\0" + data if record.state else data
            chunk.digests.append(_number(_hash(key)))
        chunk.tokens = np.concatenate([chunk.tokens, *tokens])
        chunk.weights = _joined(weights, chunk.sizes)
        return chunk

    def encode(self, record: Record) -> tuple[str, NDArray[np.integer], NDArray[np.float32] | None]:
        """Text, tokens and weights of a document; weights are None if all are 1.

        Raises:
            DataError: its turns do not fit the template, or its text is not Unicode.
        """
        pieces: list[Piece] | None = None
        mask = Mask() if self.mask.spares_text and not record.turns else self.mask
        if record.turns:
            lay = lay_verbatim if record.is_verbatim else self.template.render
            pieces = lay(record.turns)
            text = "".join(piece.text for piece in pieces)
        else:
            text = record.text
        ids = self.tokenizer.encode(text)
        if self.is_checked and self.tokenizer.decode_bytes(ids) != text.encode():
            raise DataError("the tokens do not decode to the text again")
        if self.config.append_eod:
            ids.append(self.tokenizer.eod)
        tokens = np.array(ids, dtype=self.dtype)
        if pieces is None:
            pieces = [] if mask.is_all else self._pieces_of(text, mask)
        weights = self._weights(tokens, pieces, mask)
        if record.weight != 1:
            weights = np.ones(len(ids), np.float32) if weights is None else weights
            weights = weights * np.float32(record.weight)
        return text, tokens, weights

    def encode_tokens(self, found: TokenFile) -> Iterator[Chunk]:
        """Documents of a token file, their turns found in what the tokens say."""
        number = 0
        for first, last in blocks(found):
            begin, end = found.starts[first], found.starts[last]
            tokens = np.asarray(found.tokens[begin:end])
            chunk = Chunk(tokens, num_rows=last - first)
            weights: list[NDArray[np.float32] | None] = []
            kept: list[NDArray[np.integer]] = []
            for start, stop in zip(
                found.starts[first:last] - begin,
                found.starts[first + 1 : last + 1] - begin,
                strict=True,
            ):
                number += 1
                ids = tokens[start:stop]
                try:
                    data = self.tokenizer.decode_bytes(ids.tolist())
                except DataError as error:
                    chunk.bad.append((number, str(error)))
                    continue
                chunk.num_bytes += len(data)
                document_weights = None
                if not self.masks_no_text:
                    text = data.decode("utf-8", errors="surrogateescape")
                    document_weights = self._weights(
                        ids, self._pieces_of(text, self.mask), self.mask
                    )
                if document_weights is not None and not document_weights[1:].any():
                    chunk.untrained.append(number)
                    continue
                kept.append(ids)
                weights.append(document_weights)
                chunk.sizes.append(len(ids))
                chunk.lines.append(number)
                chunk.digests.append(_number(_hash(data)))
            chunk.states, chunk.forms = [""] * len(kept), ["tokens"] * len(kept)
            chunk.tokens = np.concatenate([tokens[:0], *kept])
            chunk.weights = _joined(weights, chunk.sizes)
            yield chunk

    def encode_text(self, blocks_of_text: Iterable[str]) -> Iterator[Chunk]:
        """One document that is read piece by piece; its tokens are those of the whole text."""
        held, size, digest = "", 0, _hash()
        for block in blocks_of_text:
            held += block
            ids, rest = self._settled(held)
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
            num_rows=1,
            num_bytes=len(held.encode()),
        )

    def _record(self, row: FileRow) -> Record:
        if isinstance(row.content, DataError):
            raise row.content
        content = parse_json(row.content) if isinstance(row.content, bytes) else row.content
        return read_row(content, self.config.data_type, self.config.sft_field)

    def _pieces_of(self, text: str, mask: Mask) -> list[Piece]:
        return [Piece(text, "", "body")] if mask.marks else self.template.parse(text)

    def _weights(
        self, ids: NDArray[np.integer], pieces: list[Piece], mask: Mask
    ) -> NDArray[np.float32] | None:
        if mask.is_all and all(piece.weight == 1 for piece in pieces):
            return None
        spans, weight_of_end = mask.spans(pieces)
        weights = token_weights(ids, self._lengths, spans)
        if ids[-1] == self.tokenizer.eod:
            weights[-1] = weight_of_end
        return weights

    def _settled(self, text: str) -> tuple[list[int], str]:
        """Tokens of the start of a text that no text behind it can change, and the rest."""
        data = text.encode()
        ids = self.tokenizer.encode(text)
        ends = np.cumsum(self._lengths[ids]) if ids else np.zeros(0, dtype=np.int64)
        count = int(np.searchsorted(ends, len(data) - LONGEST_TOKEN, side="right"))
        # a token may end inside a character, where a text cannot be cut
        while count and ends[count - 1] < len(data) and data[ends[count - 1]] & 0xC0 == 0x80:
            count -= 1
        end = int(ends[count - 1]) if count else 0
        return ids[:count], data[end:].decode()


# eight bytes: a number of 64 bits
_hash = partial(blake2b, digest_size=8)


def _number(digest: blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def _joined(
    weights: list[NDArray[np.float32] | None], sizes: list[int]
) -> NDArray[np.float32] | None:
    if all(w is None for w in weights):
        return None
    filled = [
        np.ones(n, dtype=np.float32) if w is None else w
        for w, n in zip(weights, sizes, strict=True)
    ]
    return np.concatenate(filled)


def in_chunks(rows: Iterable[FileRow]) -> Iterator[list[FileRow]]:
    """Rows in lists of a size that is worth passing on."""
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
    """The chunks of lists of rows in their order, encoded by so many processes."""
    if num_workers <= 1:
        yield from map(encoder.encode_rows, lists)
        return
    from collections import deque
    from concurrent.futures import Future, ProcessPoolExecutor
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
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Callable[[list[FileRow]], Chunk] | None = None


def _start_worker(config: DataConfig, tokenizer: Tokenizer, is_checked: bool) -> None:
    global _worker
    _worker = Encoder(config, tokenizer, is_checked=is_checked).encode_rows


def _encode_in_worker(rows: list[FileRow]) -> Chunk:
    assert _worker is not None
    return _worker(rows)
