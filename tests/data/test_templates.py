"""Templates of a user's own, and the template of a run in chat and generate."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import rwkv_peft
from rwkv_peft.config import DataConfig
from rwkv_peft.data.encode import Encoder
from rwkv_peft.data.forms import read_row
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import TEMPLATES, find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.generation.chat import Chat
from rwkv_peft.generation.sampling import Sampling

CHATML = """{% for m in messages %}
<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""
ROW = {
    "messages": [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "好。"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},
    ]
}


@pytest.fixture
def jinja(tmp_path: Path) -> Callable[[str], str]:
    def write(source: str) -> str:
        (tmp_path / "own.jinja").write_text(source, encoding="utf-8")
        return str(tmp_path / "own.jinja")

    return write


def test_a_jinja_template_has_the_words_of_its_turns_found(jinja: Callable[[str], str]) -> None:
    template = find_template(jinja(CHATML))
    pieces = template.render(read_row(ROW, "auto").turns)
    assert [(p.text, p.part) for p in pieces if p.role == "assistant"] == [
        ("<|assistant|>\n", "head"), ("好。", "body"), ("<|end|>\n", "end"),
        ("<|assistant|>\n", "head"), ("a", "body"), ("<|end|>\n", "end"),
    ]  # fmt: skip
    text = "".join(p.text for p in pieces)
    assert text.startswith("<|user|>\na\n\nb<|end|>\n<|assistant|>\n好。<|end|>\n")
    assert template.prompt([Turn("user", "x")]) == "<|user|>\nx<|end|>\n<|assistant|>\n"
    assert template.stops == ("<|end|>",)
    config = DataConfig(data_file="-", template=template.name)
    document = Encoder(config, Tokenizer()).encode_record(read_row(ROW, "auto"))
    tokens, weights = document.tokens, document.weights
    assert weights is not None
    trained = [t for t, w in zip(tokens.tolist(), weights.tolist(), strict=True) if w]
    assert Tokenizer().decode(trained) == "好。<|end|>\na<|end|>\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "rewrites"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the text"),
        ("{{ raise_exception('no') }}", "fails: no"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
    ],
)
def test_a_jinja_template_that_cannot_be_used_says_why(
    source: str, message: str, jinja: Callable[[str], str]
) -> None:
    row = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}]}
    with pytest.raises((ConfigError, DataError), match=message):
        find_template(jinja(source)).render(read_row(row, "auto").turns)


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allowed is chat, think, function, document, alpaca"):
        find_template("vicuna")


@pytest.mark.parametrize("name", [*TEMPLATES, "jinja"])
def test_a_dialogue_of_several_turns_reads_the_text_that_training_would_show(
    name: str, model_file: Path, jinja: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = find_template(jinja(CHATML) if name == "jinja" else name)
    chat = Chat(rwkv_peft.load_model(model_file), Sampling(temperature=0), template=template)
    answers = ["".join(chat.reply(text, max_tokens=5)) for text in ("one", "two\n\nthree")]
    assert all(answer.startswith(template.opening) for answer in answers)
    turns = [Turn("user", "one"), Turn("assistant", answers[0]), Turn("user", "two\n\nthree")]
    assert chat._read == (template.prompt(turns) + answers[1][len(template.opening) :]).rstrip()


@pytest.mark.parametrize("name", ["document", "own.jinja"])
def test_chat_and_generate_use_the_template_of_the_run(
    name: str,
    model_file: Path,
    make_data_file: Callable[..., Path],
    jinja: Callable[[str], str],
    cli: Callable[..., SimpleNamespace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = jinja(CHATML) if name == "own.jinja" else name
    prompts: list[str] = []
    import rwkv_peft.generation.engine as engine

    real = engine.stream

    def spy(model: Any, prompt: str, **settings: Any) -> Any:
        prompts.append(prompt)
        return real(model, prompt, **settings)

    out = tmp_path / "out"
    settings = ("--epoch_count", 1, "--ctx_len", 64, "--template", template, "--proj_dir", out)
    assert cli("train", model_file, make_data_file(["a b c"]), *settings).code == 0
    if name == "own.jinja":
        Path(template).unlink()
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["template"] == (name if name == "document" else str(out / "template.jinja"))
    monkeypatch.setattr(engine, "stream", spy)
    for model in (("--load_model", out / "rwkv-0.pth"),
                  ("--load_model", model_file, "--adapter", out / "rwkv-0-adapter")):  # fmt: skip
        done = cli("generate", *model, "--user", "hi", "--max_tokens", 2, "--temperature", 0)
        assert done.code == 0, done.err
    done = cli("generate", *model, "--user", "hi", "--max_tokens", 2, "--template", "chat")
    expected = "Instruction: hi\n\nResponse:" if name == "document" else CHATML_HI
    assert prompts == [expected, expected, "User: hi\n\nAssistant:"]


CHATML_HI = "<|user|>\nhi<|end|>\n<|assistant|>\n"
