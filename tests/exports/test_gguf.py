"""GGUF files, read by llama.cpp itself."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_peft.api import load_model
from rwkv_peft.assets import BASE_MODEL
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.cli.main import main
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import TEMPLATES
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.exports import gguf
from rwkv_peft.exports.check import build_stored
from rwkv_peft.exports.texts import list_stops, to_jinja
from tests.exports.readers import Llama

TEXT = "User: hi, what is the moon?\n\nAssistant: A stone, 字.\n\nIt is"
SMALL = {
    "x070": {"n_layer": 3, "vocab_size": 400},
    # as many layers as the stream needs to be halved
    "x060": {
        "version": "x060",
        "n_layer": 7,
        "dim_ffn": 448,
        "vocab_size": 400,
        "ranks": {"maa": 32, "decay": 32},
    },
}


def calm(path: Path) -> None:
    """Shrinks the matrices, which are larger than trained ones.

    llama.cpp rounds what it multiplies by fp16 matrices to fp16 too, and through seven such layers
    that grows.
    """
    weights = read_weights(path)
    write_weights(path, {n: x / 8 if x.ndim == 2 else x.clone() for n, x in weights.items()})


def export(source: Path, folder: Path, dtype: str) -> Path:
    output = folder / f"exported-{dtype}.gguf"
    assert (
        main(["export", str(source), "--to", "gguf", "--dtype", dtype, "--output", str(output)])
        == 0
    )
    return output


def worst_difference(source: Path, exported: Path) -> float:
    """The largest difference of log-probabilities over all tokens and some positions."""
    model = load_model(source, op="reference")
    vocab_size = model.model_config.vocab_size
    tokens = Tokenizer(vocab_size).encode(TEXT)
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]))[0][0].double().log_softmax(-1)
    llama = Llama(exported)
    # at the first token RWKV-6 normalises v times one number, whose sign alone counts; near zero
    # any rounding turns it
    lengths = (2, 17, len(tokens))
    return max(
        (llama.log_probs(tokens[:n], vocab_size) - wanted[n - 1]).abs().max().item()
        for n in lengths
    )


@pytest.mark.parametrize("version", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_llama_cpp_finds_the_log_probabilities_of_the_model(
    make_model_file: Callable[..., Path], tmp_path: Path, version: str, dtype: str, tolerance: float
) -> None:
    source = make_model_file(**SMALL[version])
    if version == "x060":
        calm(source)
    assert worst_difference(source, export(source, tmp_path, dtype)) <= tolerance


def recite(path: Path, said: list[int]) -> Path:
    """Makes a model say these tokens, each of which follows one of its own, and nothing else."""
    weights = {n: torch.zeros_like(x) for n, x in read_weights(path).items()}
    for name in weights:
        if (".ln" in name and name.endswith("weight")) or name == "ln_out.weight":
            weights[name] += 1
    # token k is the k-th unit vector; the head of the next token looks for that one
    steps = list(dict.fromkeys(said))
    first = said[0] - 1
    for place, token in enumerate([first, *steps]):
        weights["emb.weight"][token, place] = 1
    follow = dict(zip([first, *said[:-1]], said, strict=True))
    for place, token in enumerate([first, *steps]):
        if token in follow:
            weights["head.weight"][follow[token], place] = 1
    write_weights(path, weights)
    return path


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE_MODEL, tmp_path_factory.mktemp("bundled"), "fp32")


def test_llama_cpp_is_as_far_from_the_exact_model_as_float32_is(bundled: Path) -> None:
    """On trained weights float32 itself is more than 1e-5 off, ours as well as llama.cpp's."""
    tokens = Tokenizer(5120).encode(TEXT)
    models = [load_model(BASE_MODEL, op="reference", dtype=d) for d in ("float64", "float32")]
    with torch.no_grad():
        exact, ours = (m(torch.tensor([tokens]))[0][0, -1].double() for m in models)
    exact, ours = exact.log_softmax(-1), ours.log_softmax(-1)
    theirs = Llama(bundled).log_probs(tokens, 5120)
    rounding = (ours - exact).abs().max()
    assert (theirs - exact).abs().max() < 4 * rounding < 1e-4


def test_llama_cpp_tokenizes_and_writes_turns_as_we_do(bundled: Path) -> None:
    llama, tokenizer = Llama(bundled), Tokenizer(5120)
    texts = [TEXT, "'\"\\ \t\r\n\n\n é😀", "  a\x00b" + "字" * 9, "\x7f\x01"]
    for text in texts:
        assert llama.ask("tokenize", content=text)["tokens"] == tokenizer.encode(text)
        assert llama.ask("detokenize", tokens=tokenizer.encode(text))["content"] == text
    turns = [("system", "s"), ("user", "a\n\nb\r\n"), ("assistant", "c\n\nd"), ("user", "e")]
    messages = [{"role": role, "content": said} for role, said in turns]
    wanted = TEMPLATES["chat"].prompt([Turn(*turn) for turn in turns])
    assert llama.ask("apply-template", messages=messages)["prompt"] == wanted


def test_every_token_of_the_vocabulary_is_read_by_llama_cpp(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model_file(n_layer=1, n_embd=64, dim_att=64, dim_ffn=64, vocab_size=65536)
    llama, tokenizer = Llama(export(source, tmp_path, "fp16")), Tokenizer(65536)
    valid = [p.decode() for p in tokenizer.vocabulary.values() if p and is_text(p)]
    text = " ".join(valid)
    assert llama.ask("tokenize", content=text)["tokens"] == tokenizer.encode(text)
    assert llama.ask("detokenize", tokens=tokenizer.encode(text))["content"] == text


def is_text(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False


def test_a_blank_line_does_not_end_an_answer_and_the_next_turn_does(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    answers = {}
    for text in (" ab\n\ncd", " ab\n\nUser: no"):
        said = Tokenizer(400).encode(text)
        assert len(set(said)) == len(said)
        source = recite(make_model_file(n_layer=1, vocab_size=400), said)
        llama = Llama(export(source, tmp_path, "fp32"))
        stops = re.findall(r'PARAMETER stop "(.*?)"', (tmp_path / "Modelfile").read_text(), re.S)
        assert stops == list_stops(TEMPLATES["chat"])
        prompt, count = [said[0] - 1], len(said)
        # without this sampler it would draw, whatever the temperature
        likeliest = {"samplers": ["top_k"], "top_k": 1}
        answer = llama.complete(prompt, n_predict=count, stop=stops, **likeliest)
        answers[text] = answer["text"]
        (tmp_path / "exported-fp32.gguf").unlink()
    assert answers == {" ab\n\ncd": " ab\n\ncd", " ab\n\nUser: no": " ab"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_form_of_a_template_gives_its_text(name: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    template = TEMPLATES[name]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja = environment.from_string(to_jinja(template))
    thought = "<think>\nv\n</think>\nw"
    dialogues = [
        [("user", "hi")],
        [("user", " a\n \n\nb\r\n\r\nc "), ("assistant", "x\n\n y"), ("user", "z")],
        [
            ("system", "s\n\nt"),
            ("user", "u"),
            ("assistant", thought),
            ("user", ""),
        ],
    ]
    for turns in dialogues:
        messages = [{"role": role, "content": said} for role, said in turns]
        given = {"messages": messages, "raise_exception": refuse}
        wanted = [Turn(*turn) for turn in turns]
        text = "".join(piece.text for piece in template.render(wanted))
        assert jinja.render(**given, add_generation_prompt=False) == text
        assert jinja.render(**given, add_generation_prompt=True) == template.prompt(wanted)
    with pytest.raises(ValueError, match="nobody"):
        jinja.render(messages=[{"role": "nobody", "content": ""}], raise_exception=refuse)


@pytest.mark.parametrize(("dtype", "kl"), [("q8_0", 3e-3), ("q5_1", 0.1), ("q4_0", 0.3)])
def test_llama_cpp_reads_quantised_files_as_we_read_them(
    bundled: Path, tmp_path: Path, dtype: str, kl: float
) -> None:
    llama = Llama(export(BASE_MODEL, tmp_path, dtype))
    tokens = Tokenizer(5120).encode(TEXT)
    found = llama.log_probs(tokens, 5120)
    model = build_stored(gguf.read(tmp_path / f"exported-{dtype}.gguf")[0])
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([tokens]))[0]
        ours = model.head(hidden)[0, -1].double().log_softmax(-1)
    # llama.cpp rounds what it multiplies to 8 bits too
    assert (ours.exp() * (ours - found)).sum() < kl
