"""Figures of texts: against single logits, per file and per role."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.evaluation import texts as module
from rwkv_peft.models.base import RWKV

Cli = Callable[..., SimpleNamespace]


def nats_of(model: RWKV, text: str) -> list[tuple[int, float]]:
    """Bytes and cross-entropy of each token of a text and its end, but the first."""
    tokenizer = rwkv_peft.Tokenizer(320)
    tokens = torch.tensor([*tokenizer.encode(text), 0])
    with torch.no_grad():
        losses = -model(tokens[None, :-1])[0][0].log_softmax(-1)
    sizes = [len(tokenizer.decode_bytes([x])) if x else 0 for x in tokens[1:].tolist()]
    return list(zip(sizes, losses.gather(1, tokens[1:, None]).flatten().tolist(), strict=True))


def expected(model: RWKV, found: list[str]) -> dict[str, float]:
    pairs = [pair for text in found for pair in nats_of(model, text)]
    nats, num_bytes = sum(x for _, x in pairs), sum(size for size, _ in pairs)
    return {
        "tokens": len(pairs),
        "bytes": num_bytes,
        "loss": nats / len(pairs),
        "perplexity": math.exp(nats / len(pairs)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


def assert_near(found: dict[str, Any], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_texts_of_several_files_are_scored_each_and_together(
    cli: Cli, make_model_file: Any, make_data_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # documents that go through in windows, in several batches
    monkeypatch.setattr(module, "WINDOW", 7)
    monkeypatch.setattr(module, "NUM_ROWS", 2)
    path = make_model_file(dtype=torch.float32)
    model = rwkv_peft.load_model(path)
    sets = {"one": ["a text of words", "字 and 字", "x" * 30], "other": ["more words " * 4]}
    files = {n: make_data_file(rows, name=f"{n}.jsonl") for n, rows in sets.items()}
    data = ",".join(map(str, files.values()))
    done = cli("eval", path, data, "--json", "true", "--precision", "fp32")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert_near(found, expected(model, sets["one"] + sets["other"]))
    for name, file in files.items():
        assert_near(found["files"][str(file)], expected(model, sets[name]))
    assert found["roles"] == {}
    shown = cli("eval", path, files["one"], "--precision", "fp32").out
    assert f"{expected(model, sets['one'])['bits_per_byte']:.4f} bits per byte" in shown


def test_dialogues_are_scored_by_what_is_trained_and_by_role(
    cli: Cli, make_model_file: Any, tmp_path: Path
) -> None:
    path = make_model_file(dtype=torch.float32)
    model = rwkv_peft.load_model(path)
    turns = [
        ("user", "What is 3?"),
        ("assistant", "It is 9."),
        ("user", "So?"),
        ("assistant", "Yes"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data = tmp_path / "rows.jsonl"
    # the second dialogue has no answer: the mask leaves it out
    lone = {"messages": [{"role": "user", "content": "hello"}]}
    data.write_text(f"{json.dumps(row)}\n{json.dumps(lone)}\n", encoding="utf-8")
    found = json.loads(cli("eval", path, data, "--json", "true", "--precision", "fp32").out)
    documents = rwkv_peft.data.prepare.read_documents(
        rwkv_peft.config.DataConfig(data_file=str(data), max_untrained=1.0),
        rwkv_peft.Tokenizer(320),
    )
    tokens = documents.tokens[documents.starts[0] : documents.starts[1]]
    text = rwkv_peft.Tokenizer(320).decode(tokens[:-1].tolist())
    pairs = nats_of(model, text)
    trained = [
        pair
        for pair, weight in zip(pairs, documents.weights[1 : len(tokens)], strict=True)
        if weight
    ]
    assert found["tokens"] == len(trained) == found["roles"]["assistant"]["tokens"]
    assert found["loss"] == pytest.approx(sum(x for _, x in trained) / len(trained), rel=1e-5)
    assert found["roles"]["assistant"]["loss"] == found["loss"]
    assert set(found["roles"]) == {"user", "assistant"}
    assert found["roles"]["user"]["bytes"] > len("What is 3?So?hello")


def test_adapter_and_state_are_evaluated(
    cli: Cli, make_model_file: Any, make_data_file: Any
) -> None:
    path, data = make_model_file(dtype=torch.float32), make_data_file()
    result = rwkv_peft.train(
        rwkv_peft.TrainConfig(
            load_model=str(path),
            data_file=str(data),
            val_file=str(data),
            proj_dir=str(path.parent / "out"),
            peft="state",
            epoch_count=1,
            precision="fp32",
            accelerator="cpu",
        )
    )
    more = ["--state", result.weights, "--json", "true", "--precision", "fp32"]
    found = json.loads(cli("eval", path, data, *more).out)
    assert found["loss"] == pytest.approx(result.evaluations[-1].loss, rel=1e-5)
    plain = json.loads(cli("eval", path, data, "--json", "true", "--precision", "fp32").out)
    assert plain["loss"] == pytest.approx(result.evaluations[0].loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given"),
        (["MODEL"], "nothing to evaluate on"),
        (["MODEL", "none.jsonl"], "there is no file none.jsonl"),
        (["MODEL", "DATA", "--tasks", "x"], "exclude each other"),
        (["MODEL", "DATA", "--include_path", "x"], "--include_path is for --tasks"),
        (["MODEL", "DATA", "--limit", "3"], "--limit is for tasks and questions"),
    ],
)
def test_a_wrong_line_is_one_error(
    arguments: list[str], message: str, cli: Cli, model_file: Path, data_file: Path
) -> None:
    given = {"MODEL": model_file, "DATA": data_file}
    done = cli("eval", *(given.get(x, x) for x in arguments))
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
