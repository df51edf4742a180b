"""What is said at the end of a run."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rwkv_peft
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.exports.formats import FORMATS
from rwkv_peft.generation.chat import Chat
from rwkv_peft.generation.sampling import Sampling
from rwkv_peft.printing import escape
from rwkv_peft.training.answers import find_question
from rwkv_peft.training.ending import PROGRAMS, read_losses
from tests.exports.test_round_trips import MODELS

Cli = Callable[..., SimpleNamespace]


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    turns = [("user", "What is love?"), ("assistant", "LOVE, n. A temporary insanity.")]
    row = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
    path.write_text(f"{row}\n" * 4, encoding="utf-8")
    return path


def test_the_end_tells_of_loss_answers_and_files(
    cli: Cli, make_model_file: Callable[..., Path], dialogues: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", make_model_file()
    line = ["train", base, dialogues, "--proj_dir", out, "--accelerator", "cpu"]
    line += ["--precision", "fp32", "--epoch_count", 6, "--epoch_save", 6, "--lr_init", 5e-3]
    done = cli(*line, "--warmup_steps", 0, "--random_seed", 1)
    assert done.code == 0, done.err
    end = done.err[done.err.index("done in ") :].splitlines()
    records = [json.loads(x)["loss"] for x in (out / "loss_data.jsonl").read_text().splitlines()]
    count = len(records)
    first, last = (sum(part) / 3 for part in (records[:3], records[-3:]))
    assert count == 6
    assert end[0].endswith(f"steps: 6; loss {first:.4f} at the beginning and {last:.4f} at the end")
    assert end[1] == "the first question of the data: What is love?"
    # the same answers by another way, from the files
    for shown, weights, adapter in (
        (end[2].removeprefix("  before: "), base, None),
        (end[3].removeprefix("  after:  "), base, out / "rwkv-5-adapter"),
    ):
        model = rwkv_peft.load_model(weights, adapter=adapter)
        text = "".join(Chat(model, Sampling(temperature=0)).reply("What is love?", 48))
        assert shown == escape(" ".join(text.split()))
    assert end[2] != end[3].replace("after: ", "before:")
    assert end[4] == f"talk with it: rwkv-peft chat {out}"
    assert end[5].startswith(f"  {out / 'rwkv-5.pth'}: the whole tuned model")
    assert end[6].startswith(f"  {out / 'rwkv-5-adapter'}: the adapter alone")
    programs = "llama.cpp, Ollama, LM Studio, koboldcpp"
    assert end[7] == (
        f"  an export opens in {programs}: rwkv-peft export {out} --to gguf; other programs: --to "
        "st (Ai00), bin (rwkv.cpp), hf-fla (flash-linear-attention)"
    )
    report = json.loads((out / "merge_report.json").read_text())
    said = [x for x in end if x.startswith("rounding: ")]
    assert bool(said) == (report["relative_error"] > 0.05)
    if said:
        (line,) = (x for x in end if "a file with " in x)
        command = shlex.split(line.partition(" of it: ")[2])
        assert command[:3] == ["rwkv-peft", "merge", str(out / "rwkv-5-adapter")]
        assert cli(*command[1:], "--compare", 0).code == 0
        assert cli("generate", out, "--prompt", "a", "--max_tokens", 1).code == 0


def test_rounding_is_told_at_the_end_alone_with_a_command_that_avoids_it(
    cli: Cli, make_model_file: Callable[..., Path], dialogues: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o u"
    line = ["train", make_model_file(), dialogues, "--proj_dir", out, "--accelerator", "cpu"]
    done = cli(*line, "--epoch_count", 2, "--lr_init", 1e-5)
    assert done.code == 0 and done.err.count("rounding: ") == 1, done.err
    assert "rounding took" not in done.err
    report = json.loads((out / "merge_report.json").read_text())
    assert report["relative_error"] > 0.05
    assert f"{report['relative_error']:.0%} of what was learned is missing" in done.err
    command = shlex.split(done.err.splitlines()[-1].partition(" of it: ")[2])
    assert command[-1] == ("fp16" if "fp16.pth" in command[-3] else "fp32")
    assert cli(*command[1:], "--compare", 0).code == 0
    # the new file is no result of the run, whose own is still found
    assert "rwkv-1.pth" in cli("generate", out, "--prompt", "a", "--max_tokens", 1).err


@pytest.mark.parametrize("train_type", ["state", "fullstate"])
def test_a_states_end_names_its_file_and_who_reads_it(
    train_type: str, cli: Cli, model_file: Path, dialogues: Path, tmp_path: Path
) -> None:
    limits = ("--epoch_count", 1, "--train_type", train_type, "--accelerator", "cpu")
    done = cli("train", model_file, dialogues, "--proj_dir", tmp_path / "out", *limits)
    assert done.code == 0, done.err
    assert "rwkv-0.pth: the state alone, for RWKV-Runner and the rwkv package" in done.err
    # of a full state there is no such file
    command = f"an export opens in Ai00: rwkv-peft export {tmp_path / 'out'} --to st"
    assert (command in done.err) == (train_type == "state")
    assert ("they want plain states, of --train_type state" in done.err) == (
        train_type == "fullstate"
    )
    assert "rounding: " not in done.err


@pytest.mark.parametrize("version", ["x070", "x060", "x052", "x051", "x050"])
@pytest.mark.parametrize("merge", [0, 1])
def test_the_end_names_exports_that_can_be_made_of_the_result(
    version: str,
    merge: int,
    cli: Cli,
    make_model_file: Callable[..., Path],
    dialogues: Path,
    tmp_path: Path,
) -> None:
    base, out = make_model_file(**MODELS[version]), tmp_path / "out"
    limits = ("--epoch_count", 1, "--merge", merge, "--accelerator", "cpu", "--peft", "lora")
    done = cli("train", base, dialogues, "--proj_dir", out, *limits)
    assert done.code == 0, done.err
    said = [x for x in done.err.splitlines() if f"rwkv-peft export {out} --to " in x]
    named = re.findall(r"--to ([\w-]+)|([\w-]+) \(", "".join(said))
    found = [a or b for a, b in named]
    # each that there is, and none that would be refused
    assert set(found) == {x for x in PROGRAMS if version in FORMATS[x].versions}
    for to in found[:1]:
        output = tmp_path / f"x{FORMATS[to].ending}"
        assert cli("export", out, "--to", to, "--output", output).code == 0


def make_documents(text: str, weights: list[int] | None = None) -> tuple[Documents, Tokenizer]:
    tokenizer = Tokenizer(65536)
    tokens = [*tokenizer.encode(text), 0]
    return Documents(
        paths=("x",),
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.array([0, len(tokens)]),
        lines=np.array([1]),
        sources=np.array([0], dtype=np.int32),
        weights=None if weights is None else np.array(weights, dtype=np.uint8),
    ), tokenizer


def test_the_first_question_is_found_with_and_without_a_mask() -> None:
    settings: Any = SimpleNamespace(template_name="chat")
    text = "System: be kind\n\nUser: who?\n\nAssistant: me\n\nUser: and?\n\nAssistant: you"
    documents, tokenizer = make_documents(text)
    found = find_question(documents, tokenizer, settings)
    assert found is not None and found.shown == "who?"
    assert tokenizer.decode(found.tokens) == "System: be kind\n\nUser: who?\n\nAssistant:"
    # a mask knows where the answer begins, in whatever words
    size = len(tokenizer.encode(text)) + 1
    weights = [0] * 5 + [1] * (size - 5)
    masked, _ = make_documents(text, weights)
    found = find_question(masked, tokenizer, settings)
    assert found is not None and found.tokens == tokenizer.encode(text)[:5]
    plain, _ = make_documents("Once upon a time there was a king who had a very long beard.")
    found = find_question(plain, tokenizer, settings)
    assert found is not None and "Once upon a time".startswith(found.shown[:9])
    assert 0 < len(found.tokens) <= 16


def test_losses_of_a_log_that_is_missing_or_short_are_none(tmp_path: Path) -> None:
    assert read_losses(tmp_path) is None
    log = tmp_path / "loss_data.jsonl"
    log.write_text('{"loss": 2.0}\n')
    assert read_losses(tmp_path) is None
    log.write_text("".join(f'{{"loss": {x}}}\n' for x in range(100)))
    assert read_losses(tmp_path) == (4.5, 94.5)
