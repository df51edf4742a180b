"""Which tokens are trained, against labels written by hand.

In an expected document « and » enclose what is trained, and ∎ is the end-of-document token.
"""

from typing import Any

import numpy as np
import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_peft.config import DataConfig
from rwkv_peft.data.encode import Encoder
from rwkv_peft.data.forms import read_row
from rwkv_peft.data.masks import Span, find_mask, weigh_tokens
from rwkv_peft.data.templates import TEMPLATES
from rwkv_peft.data.tokenizer import BUNDLED_VOCAB_FILE, Tokenizer
from rwkv_peft.errors import ConfigError, DataError

TOKENIZER, OFFICIAL = Tokenizer(), TRIE_TOKENIZER(str(BUNDLED_VOCAB_FILE))


def marked(row: dict[str, Any], **settings: Any) -> str:
    """The document of a row with its trained tokens enclosed; their ids are the official ones."""
    config = DataConfig(data_file="-", **settings)
    record = read_row(row, config.data_type, config.sft_field)
    text, tokens, weights, *_ = Encoder(config, TOKENIZER).encode_record(record)
    assert [*OFFICIAL.encode(text.decode()), 0] == tokens.tolist()
    if weights is None:
        weights = np.ones(len(tokens), dtype=np.float32)
    out, is_open = b"", False
    for token, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        if bool(weight) != is_open:
            out += ("»" if is_open else "«").encode()
            is_open = not is_open
        out += TOKENIZER.token_bytes(token) or "∎".encode()
    return (out + "»".encode() * is_open).decode()


def messages(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in turns], **more}


HELLO = messages(("user", "Hi"), ("assistant", "Hello."))
TWICE = messages(
    ("system", "Be short."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"),
    ("assistant", "4"),
)  # fmt: skip
TOOL = messages(
    ("user", "Weather?"), ("assistant", "Looking."), ("tool", '{"t": 20}'), ("assistant", "Mild.")
)


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        # rows with roles: auto is qa
        (HELLO, {}, "User: Hi\n\nAssistant:« Hello.\n\n∎»"),
        (HELLO, {"loss_mask": "qa"}, "User: Hi\n\nAssistant:« Hello.\n\n∎»"),
        (HELLO, {"loss_mask": "none"}, "«User: Hi\n\nAssistant: Hello.\n\n∎»"),
        (HELLO, {"loss_mask": "pad"}, "«User: Hi\n\nAssistant: Hello.\n\n∎»"),
        (
            HELLO,
            {"loss_mask": "qa", "train_role_words": 1},
            "User: Hi\n\n«Assistant: Hello.\n\n∎»",
        ),
        (HELLO, {"loss_mask": "roles=user"}, "User:« Hi\n\n»Assistant: Hello.\n\n∎"),
        (
            TWICE,
            {},
            "System: Be short.\n\nUser: 1+1?\n\nAssistant:« 2\n\n»User: 2+2?\n\n"
            "Assistant:« 4\n\n∎»",
        ),
        (
            TWICE,
            {"loss_mask": "roles=system, assistant"},
            "System:« Be short.\n\n»User: 1+1?\n\nAssistant:« 2\n\n»User: 2+2?\n\n"
            "Assistant:« 4\n\n∎»",
        ),
        (
            TOOL,
            {},
            "User: Weather?\n\nAssistant:« Looking.\n\n»User: Function output:\n"
            '{"t": 20}\n\nAssistant:« Mild.\n\n∎»',
        ),
        (
            TOOL,
            {"loss_mask": "roles=assistant,tool"},
            "User: Weather?\n\nAssistant:« Looking.\n\n»User: Function output:\n"
            '«{"t": 20}\n\n»Assistant:« Mild.\n\n∎»',
        ),
        # a token of two lines ends here and another begins: 。\n, \n
        (
            messages(("user", "你好。"), ("assistant", "你好！很高兴。")),
            {},
            "User: 你好。\n\nAssistant:« 你好！很高兴。\n\n∎»",
        ),
        (
            messages(("user", "Say 你好 in English…"), ("assistant", "Hello，")),
            {},
            "User: Say 你好 in English…\n\nAssistant:« Hello，\n\n∎»",
        ),
        # role words inside a turn are no headings where the row has turns
        (
            messages(("user", "What is Assistant: in User: x?"), ("assistant", "A\n\nUser: b")),
            {},
            "User: What is Assistant: in User: x?\n\nAssistant:« A\n\nUser: b\n\n∎»",
        ),
        # blank lines inside a turn of the user would end it, inside an answer they stay
        (
            messages(("user", " a\r\n\r\nb\n \n\nc\n"), ("assistant", "d\r\n\r\ne\n")),
            {},
            "User: a\nb\nc\n\nAssistant:« d\n\ne\n\n∎»",
        ),
        # a dialogue that ends with the user: nothing is trained after it
        (
            messages(("user", "a"), ("assistant", "b"), ("user", "c")),
            {},
            "User: a\n\nAssistant:« b\n\n»User: c\n\n∎",
        ),
        (messages(("user", "a"), ("assistant", "")), {}, "User: a\n\nAssistant:«\n\n∎»"),
        # thinking
        (
            {
                "messages": [
                    {"role": "user", "content": "2*3?"},
                    {"role": "assistant", "reasoning_content": "2+2+2\n\n=6", "content": "6"},
                ]
            },
            {"template": "think"},
            "User: 2*3?\n\nAssistant:« <think>\n2+2+2\n\n=6\n</think>\n6\n\n∎»",
        ),
        (HELLO, {"template": "think"}, "User: Hi\n\nAssistant:« <think>\n</think>\nHello.\n\n∎»"),
        (
            messages(("user", "Hi"), ("assistant", "<think>so</think>Yo")),
            {"template": "think"},
            "User: Hi\n\nAssistant:« <think>so</think>Yo\n\n∎»",
        ),
        # functions
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "add",
                            "description": "Adds.",
                            "parameters": {"properties": {"a": {}, "b": {}}},
                        },
                    }
                ],
                "messages": [
                    {"role": "user", "content": "1+2"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
                    },
                    {"role": "tool", "content": "3"},
                    {"role": "assistant", "content": "3"},
                ],
            },
            {"template": "function"},
            "System: Tools:\n- add(a, b): Adds.\nReturn only a JSON function call.\n\n"
            'User: 1+2\n\nAssistant:« ```json\n{"name": "add", "arguments": {"a": 1}}\n```\n\n»'
            "User: Function output:\n3\n\nAssistant:« 3\n\n∎»",
        ),
        # a message that is not to be learned
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "bad", "weight": 0},
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "good", "weight": 1},
                ]
            },
            {},
            "User: a\n\nAssistant: bad\n\nUser: b\n\nAssistant:« good\n\n∎»",
        ),
        # other forms
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            {},
            "System: Be kind.\n\nUser: a\n\nAssistant:« b\n\n∎»",
        ),
        (
            {"instruction": "Translate.", "input": "猫。", "output": "cat"},
            {},
            "User: Translate.\n猫。\n\nAssistant:« cat\n\n∎»",
        ),
        (
            {"instruction": "Translate.", "input": "猫。", "output": "cat"},
            {"template": "document"},
            "Instruction: Translate.\n\nInput: 猫。\n\nResponse:« cat\n\n∎»",
        ),
        (
            {"instruction": "Sing.", "input": "", "output": "La"},
            {"template": "alpaca"},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nSing.\n\n### Response:\n«La\n\n∎»",
        ),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            {"template": "alpaca"},
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n«3\n\n∎»",
        ),
        (
            {"q": "Why?", "r": "So."},
            {"data_type": "sft", "sft_field": ["q", "r"]},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nWhy?\n\n### Response:\n«So.\n\n∎»",
        ),
        (
            {"q": "Why?", "r": "So."},
            {"data_type": "sft", "sft_field": ["q", "r"], "template": "chat"},
            "User: Why?\n\nAssistant:« So.\n\n∎»",
        ),
        ({"prompt": "Once upon", "completion": " a time"}, {}, "Once upon« a time∎»"),
        # a token across the border is trained whole: the answer cannot be given without it
        ({"prompt": "th", "completion": "en"}, {}, "«then∎»"),
    ],
)
def test_the_document_of_a_row_and_its_trained_tokens(
    row: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    assert marked(row, **settings) == expected


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        # plain texts: auto trains them whole, qa finds their turns
        ("User: a\n\nAssistant: b", {}, "«User: a\n\nAssistant: b∎»"),
        ("User: a\n\nAssistant: b", {"loss_mask": "qa"}, "User: a\n\nAssistant:« b∎»"),
        (
            "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n",
            {"loss_mask": "qa"},
            "User: a\n\nAssistant:« b\n\n»User: c\n\nAssistant:« d\n\n∎»",
        ),
        (
            "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d",
            {"loss_mask": "qa", "train_role_words": 1},
            "User: a\n\n«Assistant: b\n\n»User: c\n\n«Assistant: d∎»",
        ),
        (
            "System: s\n\nUser: a\n\nAssistant: b",
            {"loss_mask": "roles=system"},
            "System:« s\n\n»User: a\n\nAssistant: b∎",
        ),
        # separators that do not tokenise alike
        (
            "User: 你好。\n\nAssistant: 好。\n\nUser: 再见。\n\nAssistant: 再见。",
            {"loss_mask": "qa"},
            "User: 你好。\n\nAssistant:« 好。\n\n»User: 再见。\n\nAssistant:« 再见。∎»",
        ),
        (
            "User: 你好，\n\n\nAssistant: 好…\n\n\n\nUser: x",
            {"loss_mask": "qa"},
            "User: 你好，\n\n\nAssistant:« 好…\n\n\n\n»User: x∎",
        ),
        (
            "User: a\r\n\r\nAssistant: b\r\n\r\nUser: c",
            {"loss_mask": "qa"},
            "User: a\r\n\r\nAssistant:« b\r\n\r\n»User: c∎",
        ),
        # headings count at the start and after a blank line only
        (
            "User: what does Assistant: mean?\nAssistant: x\n\nAssistant: see User: y\nUser: z",
            {"loss_mask": "qa"},
            "User: what does Assistant: mean?\nAssistant: x\n\nAssistant:« see User: y\nUser: z∎»",
        ),
        (
            "User: a\n\nAssistant: <think>one\n\ntwo</think>three",
            {"loss_mask": "qa"},
            "User: a\n\nAssistant:« <think>one\n\ntwo</think>three∎»",
        ),
        (
            "User: f\n\nAssistant: ```json\n{}\n```\n\nUser: Function output:\n1\n\nAssistant: 1",
            {"loss_mask": "roles=tool"},
            "User: f\n\nAssistant: ```json\n{}\n```\n\nUser: Function output:\n«1\n\n»"
            "Assistant: 1∎",
        ),
        # no assistant: nothing, where the older program trained everything
        ("User: a\n\nUser: b", {"loss_mask": "qa"}, "User: a\n\nUser: b∎"),
        ("Just a text.", {"loss_mask": "qa"}, "Just a text.∎"),
        ("intro\n\nAssistant: a", {"loss_mask": "qa"}, "intro\n\nAssistant:« a∎»"),
        ("\n\nAssistant: a", {"loss_mask": "qa"}, "\n\nAssistant:« a∎»"),
        (
            "Instruction: i\n\nInput: User: x\n\nResponse: r",
            {"loss_mask": "qa", "template": "document"},
            "Instruction: i\n\nInput: User: x\n\nResponse:« r∎»",
        ),
        (
            "### Instruction:\ni\n\n### Response:\nr",
            {"loss_mask": "qa", "template": "alpaca"},
            "### Instruction:\ni\n\n### Response:\n«r∎»",
        ),
        # between marks, as texts and as token ids
        (
            "<a>x<b>y<a>z<b>",
            {"loss_mask": "se", "mask_id": {"mask0": "<a>", "mask1": "<b>"}},
            "<a>x<b>«y»<a>z<b>«∎»",
        ),
        (
            "<a>x<b>y<a>z",
            {
                "loss_mask": "se",
                "mask_id": {"mask0": "<a>", "mask1": "<b>"},
                "train_role_words": 1,
            },
            "<a>x«<b>y»<a>z∎",
        ),
        (
            "User: 问。\n\nAssistant: 答。\n\nUser: 问",
            {"loss_mask": "se", "mask_id": {"mask0": "24281 59", "mask1": "[5585, 41693, 59]"}},
            "User: 问。\n\nAssistant:« 答。\n\n»User: 问∎",
        ),
    ],
)
def test_the_trained_tokens_of_a_plain_text(
    text: str, settings: dict[str, Any], expected: str
) -> None:
    assert marked({"text": text}, **settings) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["hi", "你好。", '"x"', "{a}", "(b)", "</think>", "**c**", "1"])
def test_a_prompt_is_tokenised_as_the_start_of_its_document(name: str, answer: str) -> None:
    template = TEMPLATES[name]
    row = {"messages": [{"role": "user", "content": "问。"}, {"role": "assistant", "content": "x"}]}
    turns = read_row(row, "auto").turns[:1]
    answered = read_row({"messages": [*row["messages"][:1],
                        {"role": "assistant", "content": answer}]}, "auto").turns  # fmt: skip
    text = "".join(piece.text for piece in template.render(answered))
    prompt = template.prompt(turns).removesuffix(template.opening)
    ids = TOKENIZER.encode(prompt)
    assert text.startswith(prompt)
    assert TOKENIZER.encode(text)[: len(ids)] == ids


def test_weights_of_rows_and_messages_multiply() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0.5},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        "weight": 3,
    }
    encoder = Encoder(DataConfig(data_file="-"), TOKENIZER)
    _, tokens, weights, *_ = encoder.encode_record(read_row(row, "auto"))
    assert weights is not None
    known = {TOKENIZER.encode(" b")[0]: 1.5, TOKENIZER.encode(" d")[0]: 3.0, 0: 3.0}
    found = dict(zip(tokens.tolist(), weights.tolist(), strict=True))
    assert {token: found[token] for token in known} == known
    assert found[TOKENIZER.encode(" a")[0]] == 0


def test_a_token_is_trained_if_a_span_touches_it() -> None:
    lengths = np.array([0, 1, 2, 3])
    ids = np.array([3, 2, 0, 1, 3, 3])  # bytes 0-3, 3-5, none, 5-6, 6-9, 9-12
    for start in range(13):
        for end in range(start, 13):
            found = weigh_tokens(ids, lengths, [Span(start, end, 2.0)])
            borders = np.cumsum([0, *lengths[ids]])
            for i in range(len(ids)):
                has = set(range(borders[i], borders[i + 1])) & set(range(start, end))
                if lengths[ids[i]]:
                    assert found[i] == (2.0 if has else 0.0)


@pytest.mark.parametrize(
    ("loss_mask", "mask_id", "message"),
    [
        ("qq", {}, "allowed is auto, none, pad, qa, se"),
        ("roles=", {}, "names no role"),
        ("se", {}, "there is no mask0"),
        ("se", {"mask0": "a"}, "there is no mask1"),
        ("se", {"mask0": "0", "mask1": "1"}, "token ids 0 of mask0 have no text"),
        ("se", {"mask0": "a", "mask1": "a"}, "they must differ"),
    ],
)
def test_a_mask_that_cannot_be_had_is_refused(
    loss_mask: str, mask_id: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_mask(loss_mask, mask_id=mask_id, vocabulary=TOKENIZER.vocabulary)


def test_a_role_that_the_template_has_not_is_named() -> None:
    with pytest.raises(DataError, match="template document has no role 'tool', only system, user"):
        marked(TOOL, template="document")
