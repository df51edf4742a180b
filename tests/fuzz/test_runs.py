"""What a run reads beside its model and its data: checkpoints, prompts, questions; damaged."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.checkpoint.pth import write_weights
from rwkv_peft.checkpoint.tree import FILES, MANIFEST, TENSORS, VALUES
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.evaluation.choices import is_choice_file, read_questions
from rwkv_peft.models.initial import initial_weights
from rwkv_peft.training.run import train
from rwkv_peft.training.samples import read_prompts
from tests.conftest import make_model_config
from tests.fuzz.damage import FULL, QUICK, run, spoil, spoil_value, to_json
from tests.fuzz.mutate import alter_header

TOKENIZER = Tokenizer()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    config = make_model_config(n_layer=1, n_embd=64, dim_att=64, dim_ffn=64, vocab_size=320)
    # not as they begin, where much is zero and learns nothing at first
    weights = {n: x + 0.1 * torch.randn(x.shape) for n, x in initial_weights(config, 0).items()}
    write_weights(folder / "base.pth", weights)
    (folder / "data.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    made = TrainConfig(
        load_model=str(folder / "base.pth"),
        data_file=str(folder / "data.jsonl"),
        proj_dir=str(folder / "out"),
        peft="lora",
        peft_config={"r": 1, "target_modules": ["key"]},
        dataload="pad",
        ctx_len=4,
        micro_bsz=1,
        epoch_count=1,
        precision="fp32",
        accelerator="cpu",
        merge=0,
        save_every_steps=1,
        keep=0,
        check_files=0,
    )
    train(made)
    shutil.rmtree(folder / "out" / "checkpoints" / "step-000002")
    return made


def sign(folder: Path) -> None:
    """Makes the manifest right for what is there, as who means harm does."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name in (VALUES, TENSORS):
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def damage(folder: Path, rng: random.Random) -> bool:
    """Changes a checkpoint; gives whether its hashes are right."""
    name, is_signed = rng.choice(FILES), rng.random() < 0.6
    raw = (folder / name).read_bytes()
    if name == TENSORS and is_signed and rng.random() < 0.7:
        raw = alter_header(raw, rng)
    elif name != TENSORS and rng.random() < 0.8:
        raw = to_json(spoil_value(json.loads(raw), rng))
    else:
        raw = spoil(raw, rng, at_least=1)
    (folder / name).write_bytes(raw)
    if is_signed and name != MANIFEST:
        sign(folder)
    return is_signed


def check_checkpoints(made: TrainConfig, folder: Path, seeds: range) -> set[str]:
    results = set()
    source = Path(made.proj_dir)
    kept = {n: (source / "checkpoints" / "step-000001" / n).read_bytes() for n in FILES}
    for seed in seeds:
        rng = random.Random(seed)
        out = folder / f"{seed}"
        shutil.copytree(source, out)
        checkpoint = out / "checkpoints" / "step-000001"
        is_signed = damage(checkpoint, rng)
        is_same = all((checkpoint / n).read_bytes() == x for n, x in kept.items() if n != MANIFEST)
        config = replace(made, proj_dir=str(out), resume=str(checkpoint))
        try:
            result = run(lambda c=config: train(c))  # type: ignore[misc]
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        assert is_signed or is_same or result == "refused", seed
        results.add(result)
        shutil.rmtree(out)
    return results


def test_a_damaged_checkpoint_is_refused_in_one_line_or_goes_on(
    made: TrainConfig, tmp_path: Path
) -> None:
    assert check_checkpoints(made, tmp_path, range(QUICK)) == {"read", "refused"}


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints(made: TrainConfig, tmp_path: Path) -> None:
    seeds = range(10_000, 10_000 + FULL)
    assert check_checkpoints(made, tmp_path, seeds) == {"read", "refused"}


PROMPTS = [{"prompt": "The king\u2028 said"}, {"user": "Who are you?"}]
QUESTION = {"question": "1+1?", "choices": ["1", "2", "你"], "answer": 1, "subject": "a_b"}


def read_as_prompts(path: Path, rng: random.Random) -> None:
    template = rng.choice(["chat", "document"])
    prompts = read_prompts(TrainConfig(val_prompts=str(path), template=template), TOKENIZER)
    assert all(prompt.tokens or not prompt.shown.strip() for prompt in prompts)


def read_as_questions(path: Path, _: random.Random) -> None:
    if is_choice_file(path):
        for question in read_questions(path):
            assert 0 <= question.answer < len(question.choices)
            TOKENIZER.encode(question.prompt)


READERS: dict[str, tuple[list[Any], Callable[[Path, random.Random], None]]] = {
    "prompts": (PROMPTS, read_as_prompts),
    "questions": ([QUESTION], read_as_questions),
}


def check_rows(kind: str, folder: Path, seeds: range) -> set[str]:
    rows, read = READERS[kind]
    results = set()
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / f"a{rng.choice(['.jsonl', '.jsonl', '.json', '.txt'])}"
        lines = [to_json(spoil_value(rng.choice(rows), rng)) for _ in range(2)]
        path.write_bytes(spoil(b"\n".join(lines), rng))
        try:
            results.add(run(lambda p=path, r=rng: read(p, r)))  # type: ignore[misc]
        except BaseException as error:
            raise AssertionError(f"{kind} of seed {seed}: {error!r}") from error
        path.unlink()
    return results


@pytest.mark.parametrize("kind", READERS)
def test_damaged_rows_are_refused_in_one_line_or_read(kind: str, tmp_path: Path) -> None:
    assert check_rows(kind, tmp_path, range(QUICK)) == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_thousands_of_damaged_rows(kind: str, tmp_path: Path) -> None:
    assert check_rows(kind, tmp_path, range(10_000, 10_000 + FULL)) == {"read", "refused"}


def test_a_character_that_ends_no_line_elsewhere_ends_none_in_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PROMPTS[0], ensure_ascii=False) + "\r\n", encoding="utf-8")
    (prompt,) = read_prompts(TrainConfig(val_prompts=str(path)), TOKENIZER)
    assert prompt.shown == "The king\u2028 said"
