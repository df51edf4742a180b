"""The RWKV "World" tokenizer: greedy longest match over the UTF-8 bytes of a text."""

import ast
import codecs
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from operator import index
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_peft.errors import ConfigError, DataError

BUNDLED_VOCAB_FILE = Path(__file__).parents[1] / "assets" / "rwkv_vocab_v20230424.txt"
EOD = 0

# ids 1 to 256 are the single bytes; with id 0 they are the least that encodes any text
_MIN_VOCAB_SIZE = 257
# the bundled file ends at id 65529
_FULL_VOCAB_SIZE = 65530
# vocabularies of models that speak its tokens: official ones, and the cut of the bundled model
_WORLD_SIZES = (*range(65525, 65537), 5120)
# vocabularies of GPT-2's and GPT-NeoX's tokenizers, plain and padded, as models of the Pile have
_FOREIGN_SIZES = (50257, 50277, 50280, 50288, 50304, 50432)
# measured: four bytes leave few candidates in English as well as in Chinese (3 bytes a character)
_PREFIX = 4
_SHORT_LENGTHS = tuple(range(_PREFIX - 1, 0, -1))


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class _Tables:
    pieces: dict[int, bytes]
    ids: dict[bytes, int]
    # first _PREFIX bytes -> lengths of a token that may match there, longest first
    lengths: dict[bytes, tuple[int, ...]]


class Tokenizer:
    """Text to token ids and back, exact for every byte string.

    Picklable; all instances of one vocabulary share their tables within a process.

    Args:
        vocab_size: ids of this value and above are neither produced nor accepted. At least 257.
        vocab_file: lines `id literal length`; the bundled rwkv_vocab_v20230424.txt if None.
    Raises:
        ConfigError: vocab_size is below 257.
        DataError: the file cannot be read as a vocabulary; the message names the line.
    Source: TRIE_TOKENIZER of the rwkv package, whose ids these are.
    """

    eod = EOD

    def __init__(self, vocab_size: int = 65536, *, vocab_file: Path | None = None) -> None:
        if vocab_size < _MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small for the World tokenizer: use at least "
                f"{_MIN_VOCAB_SIZE} (ids 1 to 256 are the single bytes)"
            )
        self.vocab_size = vocab_size
        self._vocab_file = vocab_file.resolve() if vocab_file else None
        self._tables = _build_tables(self._vocab_file or BUNDLED_VOCAB_FILE, vocab_size)

    @property
    def is_foreign(self) -> bool:
        """Whether models of this vocabulary have another tokenizer, whose ids mean other texts."""
        return self._vocab_file is None and self.vocab_size in _FOREIGN_SIZES

    def describe_mismatch(self) -> str:
        """What to know of a model whose vocabulary is not known to be that of RWKV World, or ""."""
        if self._vocab_file is not None or self.vocab_size in _WORLD_SIZES:
            return ""
        return (
            f"the model's vocabulary of {self.vocab_size} is neither that of RWKV World (65536) "
            f"nor a known cut of it; texts become World tokens below {self.num_tokens}, and a "
            "model with another tokenizer needs binidx, .npy or uint16 files made with that"
        )

    def require_own(self) -> None:
        """Raises ConfigError if models with this vocabulary have another tokenizer."""
        if self.is_foreign:
            raise ConfigError(
                f"a vocabulary of {self.vocab_size} is that of the GPT-NeoX tokenizer, as models "
                "of the Pile have it, and this program reads and writes texts by RWKV World's: "
                "train such a model on tokens made with its own tokenizer, as a binidx pair, a "
                ".npy file or --data_type uint16, without a mask"
            )

    @property
    def num_tokens(self) -> int:
        """One more than the largest id that has text; a model's vocabulary may be larger."""
        return max(self._tables.pieces) + 1

    @property
    def vocabulary(self) -> Mapping[int, bytes]:
        """Bytes of every id."""
        return self._tables.pieces

    @cached_property
    def token_sizes(self) -> NDArray[np.int64]:
        """(V,) bytes of the text of each id; 0 for the end-of-document token."""
        sizes = np.zeros(max(self.num_tokens, self.vocab_size), dtype=np.int64)
        for token, text in self.vocabulary.items():
            sizes[token] = len(text)
        return sizes

    # built again where it is unpickled: the tables are large, and the package's path may differ
    def __reduce__(self) -> tuple[partial["Tokenizer"], tuple[()]]:
        return partial(type(self), self.vocab_size, vocab_file=self._vocab_file), ()

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text; no end-of-document id is added.

        Args:
            text: a str, or bytes that need not be valid UTF-8.
        Raises:
            DataError: a str holds a lone surrogate, which UTF-8 cannot express.
            ConfigError: models with this vocabulary have another tokenizer.
        """
        self.require_own()
        if isinstance(text, bytes):
            return _encode_bytes(text, self._tables)
        data = _utf8(text)
        if self._vocab_file is None and self.vocab_size >= _FULL_VOCAB_SIZE:
            accelerator = _load_accelerator()
            if accelerator is not None:
                return accelerator.encode(text)
        return _encode_bytes(data, self._tables)

    def encode_with_offsets(self, text: str | bytes) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and for each the (start, end) of its bytes in the UTF-8 text.

        Args:
            text: as in `encode`.
        Returns:
            ids and spans, equally long; the spans tile the bytes without a gap.
        Raises:
            DataError: as in `encode`.
        """
        ids = self.encode(text)
        pieces = self._tables.pieces
        ends = accumulate((len(pieces[token]) for token in ids), initial=0)
        return ids, list(pairwise(ends))

    def decode(self, tokens: Iterable[int], errors: str = "replace") -> str:
        """The text of tokens; id 0 (end of document) adds nothing.

        Args:
            tokens: ids, which may start or stop inside a character.
            errors: what becomes of bytes that are not UTF-8, as in `bytes.decode`.
        Raises:
            DataError: an id is outside the vocabulary.
            UnicodeDecodeError: only with errors="strict".
        """
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens, the exact inverse of `encode`; id 0 adds nothing.

        Raises:
            DataError: an id is outside the vocabulary.
            ConfigError: models with this vocabulary have another tokenizer.
        """
        self.require_own()
        return b"".join(map(self.token_bytes, tokens))

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens in pieces, each given as soon as its characters are complete.

        Args:
            tokens: ids, taken one at a time, so a running generation can be passed.
        Returns:
            an iterator over non-empty strings which joined equal `decode(tokens)`.
        Raises:
            DataError: an id is outside the vocabulary.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if text := decoder.decode(self.token_bytes(token)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token, which may be part of a character; b"" for id 0.

        Raises:
            DataError: the id is outside the vocabulary.
        """
        pieces = self._tables.pieces
        # index() accepts the integers of numpy and torch, and refuses floats
        piece = pieces.get(index(token))
        if piece is None:
            raise DataError(
                f"token id {token} is not in the vocabulary of {len(pieces)} ids from 0 to "
                f"{max(pieces)}: check that the tokens were made with the World tokenizer"
            )
        return piece


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot express: remove it or put U+FFFD in its place"
        ) from error


def _encode_bytes(data: bytes, tables: _Tables) -> list[int]:
    id_of, lengths_of = tables.ids.get, tables.lengths.get
    ids: list[int] = []
    position, end = 0, len(data)
    while position < end:
        # at the end of the data a slice is shorter than `length`: its match is still the longest,
        # and the position, then beyond the end, ends the loop
        for length in lengths_of(data[position : position + _PREFIX], _SHORT_LENGTHS):
            token = id_of(data[position : position + length])
            if token is not None:
                ids.append(token)
                position += length
                break
    return ids


@cache
def _load_accelerator() -> _Encoder | None:
    try:
        import pyrwkv_tokenizer  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        return None
    # it takes str only, panics in decode and cannot be pickled, so it stays behind this cache
    encoder: _Encoder = pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(BUNDLED_VOCAB_FILE))
    return encoder


@cache
def _build_tables(vocab_file: Path, vocab_size: int) -> _Tables:
    pieces = {token: p for token, p in _read_vocab(vocab_file).items() if token < vocab_size}
    ids = {piece: token for token, piece in pieces.items()}
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise DataError(
            f"{vocab_file}: no token below id {vocab_size} for the single byte {missing[0]:#04x}: "
            "a vocabulary needs all 256 bytes as tokens"
        )
    found: defaultdict[bytes, set[int]] = defaultdict(set)
    for piece in ids:
        if len(piece) >= _PREFIX:
            found[piece[:_PREFIX]].add(len(piece))
    for prefix, lengths in found.items():
        lengths.add(next(n for n in _SHORT_LENGTHS if prefix[:n] in ids))
    return _Tables(pieces, ids, {p: tuple(sorted(n, reverse=True)) for p, n in found.items()})


@cache
def _read_vocab(vocab_file: Path) -> dict[int, bytes]:
    try:
        lines = vocab_file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the vocabulary {vocab_file}: {error.strerror}") from error
    pieces = {EOD: b""}
    seen = {b""}
    for number, line in enumerate(lines, start=1):
        try:
            token, piece = _parse_line(line)
            if token < 1 or token in pieces or piece in seen:
                raise ValueError("ids start at 1, and no id or token may be empty or come twice")
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{vocab_file}:{number}: not a vocabulary line: {error}") from error
        pieces[token] = piece
        seen.add(piece)
    return pieces


def _parse_line(line: bytes) -> tuple[int, bytes]:
    token, rest = line.split(b" ", 1)
    literal, length = rest.rsplit(b" ", 1)
    piece = literal[1:-1]
    # the bytes of most lines simply stand between the quotes: to pass these to literal_eval too
    # takes four times as long; the length shows whether the short way was right
    if b"\\" in literal or literal[:1] not in (b"'", b'"'):
        value = ast.literal_eval(literal.decode("utf-8"))
        piece = value.encode("utf-8") if isinstance(value, str) else value
    if not isinstance(piece, bytes) or len(piece) != int(length):
        raise ValueError(f"{literal!r} is not a string of {int(length)} bytes")
    return int(token), piece
