"""The World tokenizer against known ids, two independent tokenizers and its own inverse."""

import copy
import hashlib
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_peft.data import tokenizer as tokenizer_module
from rwkv_peft.data.tokenizer import BUNDLED_VOCAB_FILE, Tokenizer
from rwkv_peft.errors import ConfigError, DataError

KNOWN_IDS = {
    "": [],
    "\n": [11],
    "\n\n": [261],
    "\n\n\n": [3328],
    " \n\n": [3336],
    "\r\n": [263],
    "\x00": [1],
    "\x17": [24],
    "。\n": [28329],
    "。\n\n": [28329, 11],
    ">\n\n": [63, 261],
    " hi": [4571],
    "User:": [24281, 59],
    "Assistant:": [5585, 41693, 59],
    "System:": [40812, 59],
    "\n\nUser:": [261, 24281, 59],
    "<think>": [61, 35762, 63],
    "</think>": [754, 35762, 63],
    "<think></think>": [61, 35762, 5439, 35762, 63],
    " <think": [295, 35762],
}

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ,.;:'\"-()",
    "0123456789+-*/=%$_<>{}[]()\\#&|",
    "".join(map(chr, range(0x4E00, 0x9FFF))) + "。、「」",
    "".join(map(chr, range(0xFF01, 0xFFEF))),
    "".join(map(chr, range(0x3041, 0x30FF))),
    "".join(map(chr, range(0xAC00, 0xD7A3, 7))),
    "".join(map(chr, range(0x0400, 0x0500))),
    "".join(map(chr, range(0x0590, 0x0700))),
    "".join(map(chr, range(0x0900, 0x0980))) + "".join(map(chr, range(0x0E01, 0x0E5C))),
    "".join(map(chr, range(0x1F300, 0x1FAFF))) + "\u200d\ufe0f\U0001f1e9\U0001f1ea",
    "aeionu" + "".join(map(chr, range(0x0300, 0x036F))),
    " \t\n\r\u00a0\u2003\u2028\u3000\x0b\x85",
    "\x00\x01\x17\x7f\ufeff\ufffd\uffff\U0010ffff",
]
WORDS = [
    *("User:", "Assistant:", "\n\n", " the", " and", "tokenizer", "    return", "def ", "https://"),
    *("你好", "世界", "的", " 2024", "();\n", "ing", "<think>", "</think>", "\t\t", "        "),
]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(WORDS))
            elif kind < 0.5:
                parts.append(rng.choice(" \n\t=-.") * rng.randrange(1, 140))
            else:
                parts.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(1, 12))))
        texts.append("".join(parts))
    return texts


TEXTS = random_texts(3000, seed=1)


def own_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids from the pure Python way, which bytes always take."""
    return tokenizer.encode(text.encode())


def longest_match(data: bytes, pieces: dict[bytes, int]) -> list[int]:
    """Ids by the definition: at each place the longest token that fits."""
    ids, start = [], 0
    while start < len(data):
        stop = min(len(data), start + 128)
        while data[start:stop] not in pieces:
            stop -= 1
        ids.append(pieces[data[start:stop]])
        start = stop
    return ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_the_bundled_vocabulary_is_the_official_file_byte_for_byte() -> None:
    digest = hashlib.sha256(BUNDLED_VOCAB_FILE.read_bytes()).hexdigest()
    assert digest == "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


@pytest.mark.parametrize("text", KNOWN_IDS)
def test_known_texts_have_their_official_ids(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == KNOWN_IDS[text]
    assert own_ids(tokenizer, text) == KNOWN_IDS[text]


def test_ids_and_bytes_equal_those_of_the_rwkv_package(tokenizer: Tokenizer) -> None:
    oracle_module = pytest.importorskip("rwkv.rwkv_tokenizer")
    oracle = oracle_module.TRIE_TOKENIZER(str(BUNDLED_VOCAB_FILE))
    assert {i: tokenizer.token_bytes(i) for i in range(1, 65530)} == oracle.idx2token
    for text in TEXTS:
        assert own_ids(tokenizer, text) == oracle.encode(text)
    rng = random.Random(2)
    for _ in range(300):
        data = rng.randbytes(rng.randrange(1, 80))
        assert tokenizer.encode(data) == oracle.encodeBytes(data)


def test_the_accelerator_gives_the_same_ids_as_the_own_encoder(tokenizer: Tokenizer) -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    accelerator = tokenizer_module._load_accelerator()
    assert accelerator is not None
    for text in TEXTS:
        assert accelerator.encode(text) == own_ids(tokenizer, text)


@pytest.mark.parametrize("is_present", [True, False])
def test_encode_works_with_and_without_the_accelerator(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, is_present: bool
) -> None:
    class Recorder:
        def encode(self, text: str) -> list[int]:
            return [1, 2, 3]

    found = Recorder() if is_present else None
    monkeypatch.setattr(tokenizer_module, "_load_accelerator", lambda: found)
    assert tokenizer.encode("User:") == ([1, 2, 3] if is_present else [24281, 59])
    assert Tokenizer(65530).encode("User:") == ([1, 2, 3] if is_present else [24281, 59])
    assert tokenizer.encode(b"User:") == [24281, 59]


def test_the_accelerator_is_left_out_for_another_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise AssertionError("the accelerator knows the full bundled vocabulary only")

    monkeypatch.setattr(tokenizer_module, "_load_accelerator", refuse)
    assert Tokenizer(65529).encode("User:") == [24281, 59]
    assert Tokenizer(vocab_file=BUNDLED_VOCAB_FILE).encode("User:") == [24281, 59]


def test_every_text_survives_a_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(own_ids(tokenizer, text), errors="strict") == text


def test_every_byte_string_survives_a_round_trip(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    cases = [bytes([first, second]) for first in range(256) for second in range(0, 256, 5)]
    cases += [rng.randbytes(rng.randrange(0, 60)) for _ in range(1000)]
    cases += [text.encode()[rng.randrange(4) : -rng.randrange(1, 4)] for text in TEXTS[:500]]
    for data in cases:
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_every_token_of_the_vocabulary_encodes_to_its_own_id(tokenizer: Tokenizer) -> None:
    for token in range(1, 65530):
        assert tokenizer.encode(tokenizer.token_bytes(token)) == [token]


def test_offsets_tile_the_bytes_and_name_the_token(tokenizer: Tokenizer) -> None:
    for text in [*TEXTS[:500], "", "\ufeff。\n\n"]:
        data = text.encode()
        for argument in (text, data):
            ids, spans = tokenizer.encode_with_offsets(argument)
            assert ids == tokenizer.encode(argument)
            assert [data[start:end] for start, end in spans] == list(
                map(tokenizer.token_bytes, ids)
            )
            borders = [0, *(end for _, end in spans)]
            assert [start for start, _ in spans] == borders[:-1]
            assert borders[-1] == len(data)


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 1024, 30000, 65529])
def test_a_smaller_vocabulary_is_greedy_over_what_is_left(
    tokenizer: Tokenizer, vocab_size: int
) -> None:
    small = Tokenizer(vocab_size)
    left = {tokenizer.token_bytes(i): i for i in range(1, vocab_size)}
    for text in TEXTS[:150]:
        ids = small.encode(text)
        assert max(ids) < vocab_size
        assert ids == longest_match(text.encode(), left)
        assert small.decode(ids) == text
        assert small.encode_with_offsets(text)[0] == ids


def test_a_padded_vocabulary_encodes_as_the_official_one(tokenizer: Tokenizer) -> None:
    assert Tokenizer(70000).encode("User: 你好") == tokenizer.encode("User: 你好")


@pytest.mark.parametrize("vocab_size", [-1, 0, 256])
def test_a_vocabulary_without_all_single_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"vocab_size={vocab_size}\b.*at least 257"):
        Tokenizer(vocab_size)


def test_end_of_document_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert Tokenizer.eod == tokenizer.eod == 0
    assert tokenizer.token_bytes(0) == b""
    assert tokenizer.decode([0, 4571, 0]) == " hi"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("token", [-1, 65530, 65535, 10**9])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_it(
    tokenizer: Tokenizer, token: int
) -> None:
    with pytest.raises(DataError, match=rf"token id {token} .*from 0 to 65529"):
        tokenizer.decode_bytes([11, token])
    with pytest.raises(DataError, match=str(token)):
        tokenizer.decode([token])
    with pytest.raises(DataError, match=str(token)):
        list(tokenizer.decode_stream([token]))


def test_a_smaller_vocabulary_refuses_to_decode_ids_beyond_it() -> None:
    with pytest.raises(DataError, match=r"token id 300 .*from 0 to 299"):
        Tokenizer(300).decode([300])


def test_integers_of_numpy_and_torch_decode_and_floats_do_not(tokenizer: Tokenizer) -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    assert tokenizer.decode(numpy.array([24281, 59], dtype=numpy.uint16)) == "User:"
    assert tokenizer.decode(torch.tensor([24281, 59])) == "User:"
    with pytest.raises(TypeError):
        tokenizer.decode([59.0])  # type: ignore[list-item]


def test_bytes_that_are_no_text_decode_by_the_policy_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你".encode()[:2] + b"!")
    assert tokenizer.decode(ids) == "\ufffd!"
    assert tokenizer.decode(ids, errors="ignore") == "!"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(ids, errors="strict")


@pytest.mark.parametrize("text", ["ab\ud83d", "ab\udc00cd", "ab\udfff\ud800"])
def test_a_lone_surrogate_is_an_error_that_says_where(tokenizer: Tokenizer, text: str) -> None:
    for call in (tokenizer.encode, tokenizer.encode_with_offsets, Tokenizer(257).encode):
        with pytest.raises(DataError) as caught:
            call(text)
        message = str(caught.value)
        assert f"U+{ord(text[2]):04X} at character 2" in message
        assert "remove it" in message
        assert message.isprintable()


def test_a_stream_gives_whole_characters_and_in_sum_the_text(tokenizer: Tokenizer) -> None:
    # one byte a token is the hardest case: every character of more than one byte is split
    for source in (tokenizer, Tokenizer(257)):
        for text in TEXTS[:400]:
            parts = list(source.decode_stream(source.encode(text)))
            assert "".join(parts) == text
            assert all(parts)
            assert "\ufffd" in text or "\ufffd" not in "".join(parts)


def test_a_stream_of_broken_bytes_equals_decoding_at_once(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(500):
        ids = rng.choices(range(257), k=rng.randrange(1, 40)) + rng.choices(range(65530), k=5)
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_a_stream_yields_before_the_next_token_is_asked_for(tokenizer: Tokenizer) -> None:
    first, second = "你".encode()[:1], "你".encode()[1:]
    taken: list[int] = []

    def generation() -> Iterator[int]:
        for token in [4571, *tokenizer.encode(first), *tokenizer.encode(second), 0, 11]:
            taken.append(token)
            yield token

    stream = tokenizer.decode_stream(generation())
    assert (next(stream), len(taken)) == (" hi", 1)
    assert next(stream) == "你"
    assert taken[-1] not in (0, 11)
    assert list(stream) == ["\n"]


@pytest.mark.parametrize("vocab_size", [300, 65536])
@pytest.mark.parametrize("vocab_file", [None, BUNDLED_VOCAB_FILE])
def test_a_pickled_tokenizer_is_small_and_encodes_the_same(
    vocab_size: int, vocab_file: Path | None
) -> None:
    original = Tokenizer(vocab_size, vocab_file=vocab_file)
    text = "User: 你好\n\nAssistant: hi"
    ids = original.encode(text)
    pickled = pickle.dumps(original)
    assert len(pickled) < 1000
    for twin in (pickle.loads(pickled), copy.deepcopy(original)):
        assert (twin.vocab_size, twin.encode(text)) == (original.vocab_size, ids)
        assert twin._tables is original._tables


def test_the_accelerator_is_imported_late_and_may_be_absent() -> None:
    code = (
        "import sys; from rwkv_peft.data.tokenizer import Tokenizer; t = Tokenizer();"
        "assert 'pyrwkv_tokenizer' not in sys.modules; sys.modules['pyrwkv_tokenizer'] = None;"
        "assert t.encode('User:') == [24281, 59]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BYTE_LINES = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]


def write_vocab(path: Path, lines: list[str], newline: str = "\n") -> Path:
    path.write_bytes(newline.join([*lines, ""]).encode())
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_vocabulary_file_of_ones_own_may_have_gaps_and_any_line_end(
    tmp_path: Path, newline: str
) -> None:
    lines = [*BYTE_LINES, "300 'ab' 2", '301 "d\'" 2', r"302 'é\n' 3", "400 b'\\xff\\xfe' 2"]
    own = Tokenizer(vocab_file=write_vocab(tmp_path / "vocab.txt", lines, newline))
    assert own.encode(b"abd'\xc3\xa9\n\xff\xfec") == [300, 301, 302, 400, 100]
    with pytest.raises(DataError, match="token id 299 "):
        own.decode([299])


@pytest.mark.parametrize(
    "line",
    [
        "300 'ab' 3",
        "300 'ab'",
        "x 'ab' 2",
        "300 ab 2",
        "300 17 2",
        "300 __import__('os') 2",
        "300 '' 0",
        "0 'ab' 2",
        "-1 'ab' 2",
        "5 'ab' 2",
        "300 'a' 1",
        "300 '\\ud800' 3",
        "300 'a\\",
        "",
    ],
)
def test_a_bad_vocabulary_line_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = write_vocab(tmp_path / "vocab.txt", [*BYTE_LINES, line])
    with pytest.raises(DataError, match=r"vocab\.txt:257: "):
        Tokenizer(vocab_file=path)


def test_a_vocabulary_file_must_hold_every_single_byte(tmp_path: Path) -> None:
    path = write_vocab(tmp_path / "vocab.txt", BYTE_LINES[:255])
    with pytest.raises(DataError, match="0xff"):
        Tokenizer(vocab_file=path)


def test_a_missing_vocabulary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt"):
        Tokenizer(vocab_file=tmp_path / "none.txt")
