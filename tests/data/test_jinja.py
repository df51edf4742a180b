"""Chat templates as they are published for Hugging Face's transformers, compared with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.encode import Encoder
from rwkv_peft.data.forms import read_row
from rwkv_peft.data.jinja import JinjaTemplate
from rwkv_peft.data.masks import find_mask
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.generation.engine import cut_at_stop

TEMPLATES = {
    # the date, blocks with and without their end, loop controls and white-space control
    "blocks": """{%- set today = strftime_now("%d %B %Y") -%}
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}<|system|>
Today is {{ today }}.<|end|>
{% endif %}
{% for message in messages %}
{%- if message.role == 'assistant' -%}
<|assistant|>
{% generation %}{{ message.content }}<|end|>{% endgeneration %}

{% continue %}
{%- endif -%}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% endif %}""",
    "chatml": """{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {{- '\\n' + message.content }}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    # a system turn is written inside of the user's
    "folded": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
{% elif message['role'] == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token -}}
{% endif %}{% endfor %}""",
    "needs a user": """{{ bos_token }}
{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}
{{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- set space = namespace(count=0) %}
{%- for m in messages %}
{%- set space.count = space.count + 1 %}
{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\\n' }}{%- endif %}""",
}
MESSAGES = [
    {"role": "system", "content": "Be s."},
    {"role": "user", "content": "s"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "m"},
    {"role": "assistant", "content": "二\n\n<b>"},
]


def official(source: str, messages: list[Any], **variables: Any) -> tuple[str, list[Any]]:
    """Text and generated spans of transformers itself."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [messages],
        chat_template=source,
        return_assistant_tokens_mask=True,
        **{"bos_token": "", "eos_token": "", **variables},
    )
    return texts[0], spans[0]


def trained(template: str, messages: list[Any], loss_mask: str = "qa") -> str:
    """The trained bytes, before tokens that lie across a border are taken whole."""
    pieces = find_template(template).render(read_row({"messages": messages}, "auto").turns)
    text = "".join(piece.text for piece in pieces).encode()
    spans, _ = find_mask(loss_mask).find_spans(pieces)
    return b"".join(text[start:end] for start, end, _ in spans).decode()


@pytest.fixture
def jinja(tmp_path: Path) -> Callable[[str], str]:
    def write(source: str) -> str:
        (tmp_path / "own.jinja").write_text(source, encoding="utf-8")
        return str(tmp_path / "own.jinja")

    return write


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_document_is_what_transformers_writes(name: str, first: int) -> None:
    template, messages = JinjaTemplate(name, TEMPLATES[name]), MESSAGES[first:]
    turns = read_row({"messages": messages}, "auto").turns
    pieces = template.render(turns)
    assert "".join(piece.text for piece in pieces) == official(TEMPLATES[name], messages)[0]
    bodies = [p.text for p in pieces if p.part == "body" and p.role != "assistant"]
    assert [text.strip() for text in bodies] == [t.text for t in turns if t.role != "assistant"]
    asked = official(TEMPLATES[name], messages[:-1], add_generation_prompt=True)[0]
    assert template.prompt(turns[:-1]) == asked


@pytest.mark.parametrize("first", [0, 1])
def test_a_generation_block_says_what_is_trained(first: int, jinja: Callable[[str], str]) -> None:
    messages = MESSAGES[first:]
    text, spans = official(TEMPLATES["blocks"], messages)
    expected = "".join(text[start:end] for start, end in spans)
    assert expected == "a<|end|>二\n\n<b><|end|>"
    path = jinja(TEMPLATES["blocks"])
    assert trained(path, messages) == trained(path, messages, "auto") == expected
    assert trained(path, messages, "roles=user") == "s<|end|>\nm<|end|>\n"
    document = Encoder(DataConfig(data_file="-", template=path), Tokenizer()).encode_record(
        read_row({"messages": messages}, "auto")
    )
    # the end of the document is trained as that of its last turn
    assert document.weights is not None and document.weights[-1] == 1


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}<e>", "ac"),
        ("{%- generation -%} {{ m.content }}<e> {%- endgeneration -%}", "a<e>c<e>"),
        ("<m>{% generation %}<n>{{ m.content }}{% endgeneration %}<e>", "<n>a<n>c"),
        ("{{ m.content }}{% generation %}<e>{% endgeneration %}", "<e><e>"),
        ("{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
         "{% else %}{{ m.content }}{% endif %}<e>", None),
        ("{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x }}", "ac"),
    ],
)  # fmt: skip
def test_blocks_anywhere_in_a_turn_are_found(
    block: str, expected: str | None, jinja: Callable[[str], str]
) -> None:
    source = (
        "{% for m in messages %}<{{ m.role[0] }}>{% if m.role == 'assistant' %}" + block
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )  # fmt: skip
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, "xayc", strict=True)]
    found = trained(jinja(source), messages)
    assert found == ("c" if expected is None else expected)
    # a turn that its row leaves out stays untrained
    rows: list[dict[str, Any]] = [dict(message) for message in messages]
    rows[1]["train"] = False
    half = len(expected) // 2 if expected else 0
    assert trained(jinja(source), rows) == found[half:]


def test_the_environment_is_that_of_transformers() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{{ {'b': '<字>', 'a': [1]} | tojson }}{{ [1, 2] | tojson(indent=1) }}"
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}"
        "{{ '字' | tojson(ensure_ascii=True) }}{{ tools is none }}{{ documents is none }}"
        "{{ eos_token + bos_token }}{{ strftime_now('%Y') }}"
    )
    turns = [Turn("user", "x")]
    text = "".join(piece.text for piece in JinjaTemplate("t", source).render(turns))
    assert text == official(source, [{"role": "user", "content": "x"}])[0]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("blocks", ("<|end|>",)),
        ("chatml", ("<|im_end|>",)),
        ("folded", (" [INST]",)),
        ("needs a user", ("\n<turn>user", "\n<turn>tool", "\n<turn>system", "\n<turn>model")),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(name: str, stops: tuple[str, ...]) -> None:
    assert JinjaTemplate(name, TEMPLATES[name]).stops == stops


def test_a_rule_inside_of_an_answer_is_not_its_end() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n\\n---\\n\\n' }}{% endfor %}"
    )
    stops = JinjaTemplate("t", source).stops
    for text, kept in (("a --- b\n---\nc", "a --- b\n---\nc"), ("a\n\n---\n\nuser: b", "a")):
        assert "".join(cut_at_stop(iter(text), stops)) == kept
    source = "{% for m in messages %}{{ m.content }}{{ '\\n' }}{% endfor %}"
    assert JinjaTemplate("t", source).stops == ()


def test_a_file_that_is_not_utf_8_or_not_closed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="byte 0 is not UTF-8"):
        find_template(str(path))
    path.write_text("{% generation %}")
    with pytest.raises(ConfigError, match="endgeneration"):
        find_template(str(path))


def test_the_first_reason_of_a_template_that_cannot_be_used_is_told() -> None:
    source = "{{ messages[0].content.missing.missing }}"
    with pytest.raises(DataError, match="fails"):
        JinjaTemplate("t", source).render([Turn("user", "x"), Turn("assistant", "y")])
