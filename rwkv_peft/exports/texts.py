"""Vocabulary and templates as other programs want them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from rwkv_peft.data.jinja import JinjaTemplate
from rwkv_peft.data.templates import Framed, Template
from rwkv_peft.data.tokenizer import Tokenizer

# the text by which Hugging Face tokenizers of RWKV call token 0
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
# the name by which Ollama looks for such a file, and how ours begin
MODELFILE, MODELFILE_MARK = "Modelfile", "# of rwkv-peft export:"


def iterate_words(vocab_size: int) -> Iterator[bytes | None]:
    """The bytes of each id from 1 on; None for ids that have no text."""
    vocabulary = Tokenizer(vocab_size).vocabulary
    return (vocabulary.get(token) for token in range(1, vocab_size))


def to_jinja(template: Template) -> str:
    """A template as Hugging Face chat templates are written; with jinja2 it gives the same text."""
    if isinstance(template, JinjaTemplate):
        return template.source
    assert isinstance(template, Framed)
    frames = {role: frame for role, frame in template.frames.items() if role != "input"}
    heads = json.dumps({role: frame.head for role, frame in frames.items()})
    spaces = json.dumps({role: frame.space for role, frame in frames.items()})
    plain = json.dumps([role for role, frame in frames.items() if frame.has_no_blank_line])
    preface, thought = json.dumps(template.preface[0]), json.dumps("<think>\n</think>\n")
    lines = [f"{{%- set heads = {heads} -%}}", f"{{%- set spaces = {spaces} -%}}"]
    if template.preface[0]:
        lines += [
            "{%- if not messages or messages[0]['role'] != 'system' -%}",
            f"{{{{ {preface} + '\\n\\n' }}}}",
            "{%- endif -%}",
        ]
    lines += [
        "{%- for message in messages -%}",
        "{%- if message['role'] not in heads -%}",
        "{{ raise_exception('there is no role ' + message['role']) }}",
        "{%- endif -%}",
        "{%- set said = (message['content'] or '').replace('\\r\\n', '\\n').strip() -%}",
        f"{{%- if message['role'] in {plain} -%}}",
        "{%- set kept = namespace(text='') -%}",
        "{%- for line in said.split('\\n') if line.strip() -%}",
        "{%- set kept.text = kept.text + ('\\n' if kept.text else '') + line -%}",
        "{%- endfor -%}",
        "{%- set said = kept.text -%}",
        "{%- endif -%}",
    ]
    if template.adds_empty_thought:
        lines += [
            "{%- if message['role'] == 'assistant' and not said.startswith('<think>') -%}",
            f"{{%- set said = {thought} + said -%}}",
            "{%- endif -%}",
        ]
    prompt = json.dumps(template.frames["assistant"].head + template.opening)
    return "".join(
        [
            *lines,
            "{{ heads[message['role']] }}",
            "{{ spaces[message['role']] + said if said else '' }}",
            "{{ '\\n\\n' }}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            f"{{{{ {prompt} }}}}",
            "{%- endif -%}",
        ]
    )


def list_stops(template: Template) -> list[str]:
    """Texts before which an answer ends, for programs that know no headings.

    A heading ends it behind a blank line alone, so a blank line within an answer does not.
    """
    if isinstance(template, Framed):
        heads = (frame.head for frame in template.frames.values())
        # one that begins with another needs no text of its own
        words = sorted({head.rstrip() for head in heads if head.strip()}, key=len)
        return [f"\n\n{w}" for i, w in enumerate(words) if not w.startswith(tuple(words[:i]))]
    return [stop for stop in template.stops if isinstance(stop, str)]


def write_modelfile(gguf: Path, template: Template) -> str:
    """The Modelfile by which Ollama takes a GGUF file up.

    Ollama reads no escapes in quotes, so that line breaks stand there as they are.
    """
    lines = [f"{MODELFILE_MARK} ollama create NAME -f {MODELFILE}", f"FROM ./{gguf.name}"]
    if isinstance(template, Framed):
        lines.append(f'TEMPLATE """{_to_go(template)}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in list_stops(template)]
    return "\n".join(lines) + "\n"


def _to_go(template: Framed) -> str:
    """A template in the language of Ollama; blank lines of a user are not taken out there."""
    thought = "<think>\n</think>\n" if template.adds_empty_thought else ""
    branches = [
        f'eq .Role "{role}" }}}}{frame.head}{frame.space}{thought * (role == "assistant")}'
        "{{ .Content }}\n\n"
        for role, frame in template.frames.items()
        if role != "input"
    ]
    preface = f"{template.preface[0]}\n\n" if template.preface[0] else ""
    turns = "{{ if " + "{{ else if ".join(branches) + "{{ end }}"
    prompt = template.frames["assistant"].head + template.opening
    return f"{preface}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{prompt}"


def tokenizer_json(vocab_size: int) -> dict[str, object]:
    """The content of tokenizer.json, for the tokenizers library.

    RWKV's tokenizer takes the longest token that fits, over bytes: one regular expression of all
    tokens, the longest first, splits a text that way; bytes are written as its ByteLevel does.
    """
    letters = _byte_letters()
    words = dict(enumerate(iterate_words(vocab_size), 1))
    names = {
        token: f"[PAD{token}]" if word is None else "".join(letters[byte] for byte in word)
        for token, word in words.items()
    }
    longest = sorted(
        (t for t, word in words.items() if word is not None), key=lambda t: -len(words[t] or b"")
    )
    pattern = "|".join(re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", names[token]) for token in longest)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**byte_level, "trim_offsets": True}, split],
        },
        "post_processor": None,
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {
            "type": "WordLevel",
            "vocab": {END_OF_TEXT: 0, **{name: token for token, name in names.items()}},
            "unk_token": END_OF_TEXT,
        },
    }  # fmt: skip


def _byte_letters() -> dict[int, str]:
    """The letters by which GPT-2 and the tokenizers library write bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
