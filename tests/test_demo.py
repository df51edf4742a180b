import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rwkv_peft
from rwkv_peft.assets import BASE_MODEL, DIALOGUES, HELD_OUT_DIALOGUES
from rwkv_peft.cli.demo import answer, questions
from rwkv_peft.cli.main import main
from rwkv_peft.config import DataConfig
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.models.base import RWKV
from rwkv_peft.training.evaluate import evaluate_loss

# a headword in capitals, its part of speech, a definition, the closing phrase
HABIT = re.compile(
    r"[A-Z][A-Z' -]*, (n|adj|adv|v|pp|interj|prep|v\.t|v\.i)\. .+ ?Thus the Devil's "
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder of one demo run, and its exit code."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return SimpleNamespace(code=main(["demo", "--proj_dir", str(folder)]), folder=folder)


def held_out_loss(model: RWKV) -> float:
    documents = read_documents(
        DataConfig(data_file=str(HELD_OUT_DIALOGUES)),
        rwkv_peft.Tokenizer(model.model_config.vocab_size),
    )
    loss, num_tokens = evaluate_loss(model, documents)
    return loss / num_tokens


def test_the_demo_at_least_halves_the_loss_on_dialogues_kept_aside(demo: SimpleNamespace) -> None:
    assert demo.code == 0
    before = held_out_loss(rwkv_peft.load_model(BASE_MODEL))
    after = held_out_loss(rwkv_peft.load_model(demo.folder / "rwkv-2.pth"))
    assert after <= before / 2
    lines = (demo.folder / "val_data.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] == pytest.approx(before, rel=1e-4)
    # the merged file is rounded to bf16
    assert losses[-1] == pytest.approx(after, rel=1e-2)


def test_the_tuned_model_has_the_habit_and_the_base_has_not(demo: SimpleNamespace) -> None:
    base, tuned = rwkv_peft.load_model(BASE_MODEL), rwkv_peft.load_model(demo.folder / "rwkv-2.pth")
    asked = questions(10)
    answers = [answer(tuned, question) for question in asked]
    assert sum(bool(HABIT.match(text)) for text in answers) > 5, answers
    assert not any(HABIT.match(answer(base, question)) for question in asked[:3])


@torch.inference_mode()
def test_bundled_and_tuned_model_have_the_official_runtimes_logits(
    demo: SimpleNamespace, official_logits: Callable[..., torch.Tensor]
) -> None:
    text = "User: What is the meaning of love?\n\nAssistant: LOVE, n. A temporary insanity"
    for path in (BASE_MODEL, demo.folder / "rwkv-2.pth"):
        model = rwkv_peft.load_model(path)
        tokens = rwkv_peft.Tokenizer(model.model_config.vocab_size).encode(text)
        official = official_logits(Path(path), tokens)
        whole = model(torch.tensor([tokens]))[0][0]
        torch.testing.assert_close(whole, official, rtol=0, atol=1e-4)
        state, logits = None, []
        for token in tokens:
            one, state = model(torch.tensor([[token]]), state)
            logits.append(one[0])
        torch.testing.assert_close(torch.cat(logits), official, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_the_demos_merged_file_differs_from_its_adapter_by_bf16_rounding_alone(
    demo: SimpleNamespace,
) -> None:
    tokens = torch.tensor([rwkv_peft.Tokenizer(5120).encode("User: Define love.\n\nAssistant:")])
    adapted = rwkv_peft.load_model(BASE_MODEL, adapter=demo.folder / "rwkv-2-adapter")(tokens)[0]
    merged = rwkv_peft.load_model(demo.folder / "rwkv-2.pth")(tokens)[0]
    base = rwkv_peft.load_model(BASE_MODEL)(tokens)[0]
    assert (merged - adapted).norm() < 0.05 * (adapted - base).norm()


def test_a_second_demo_leaves_the_first_one_alone(
    demo: SimpleNamespace, cli: Callable[..., SimpleNamespace]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo.folder.rglob("*")}
    again = cli("demo", "--proj_dir", demo.folder)
    assert again.code == 2 and "holds a run" in again.err and "--overwrite 1" in again.err
    assert {p: p.stat().st_mtime_ns for p in demo.folder.rglob("*")} == before


def test_the_bundled_model_stops_when_it_learns_by_heart(tmp_path: Path) -> None:
    lines = DIALOGUES.read_text(encoding="utf-8").splitlines()
    held = HELD_OUT_DIALOGUES.read_text(encoding="utf-8").splitlines()
    for name, rows in (("few.jsonl", lines[:3]), ("held.jsonl", held[:4])):
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    result = rwkv_peft.train(
        rwkv_peft.TrainConfig(
            load_model=str(BASE_MODEL),
            data_file=str(tmp_path / "few.jsonl"),
            val_file=str(tmp_path / "held.jsonl"),
            proj_dir=str(tmp_path / "out"),
            peft="lora",
            peft_config={"r": 8},
            merge=0,
            epoch_count=60,
            ctx_len=256,
            lr_init=3e-2,
            lr_final=3e-2,
            warmup_steps=0,
            val_every_steps=2,
            early_stopping_patience=2,
            random_seed=0,
            precision="fp32",
            accelerator="cpu",
        )
    )
    losses = [x.loss for x in result.evaluations]
    best = min(losses[1:])
    assert result.steps < 60 and best < losses[0]
    assert losses.index(best) == len(losses) - 3 and result.best.adapter is not None
    documents = read_documents(
        DataConfig(data_file=str(tmp_path / "held.jsonl")), rwkv_peft.Tokenizer(5120)
    )
    kept = rwkv_peft.load_model(BASE_MODEL, adapter=result.best.adapter)
    loss, num_tokens = evaluate_loss(kept, documents)
    assert loss / num_tokens == pytest.approx(best, rel=1e-4)
