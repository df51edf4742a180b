"""Evaluation while training: its figures, what it keeps, and that it changes nothing."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import read_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.recorder import Result
from rwkv_peft.training.run import train
from tests.training.test_resume import assert_same, run_in_parts

Run = Callable[..., Result]


def dialogue(n: int) -> str:
    return f"User: What is {n}?\n\nAssistant: {n} is 字 {n * n}."


DIALOGUES = [dialogue(n) for n in range(6)]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_peft.training.samples.NUM_TOKENS", 6)


@pytest.fixture
def config(model_file: Path, make_data_file: Any, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(model_file),
        data_file=str(make_data_file([dialogue(n) for n in range(10, 18)])),
        val_file=str(make_data_file(DIALOGUES, name="held.jsonl")),
        loss_mask="qa",
        proj_dir=str(tmp_path / "out"),
        peft="lora",
        peft_config={"r": 4},
        epoch_count=2,
        micro_bsz=4,
        ctx_len=48,
        lr_init=1e-2,
        lr_final=1e-2,
        warmup_steps=0,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
    )


@pytest.fixture
def run(config: TrainConfig) -> Run:
    return lambda **changes: train(replace(config, **changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure_answers(model: RWKV) -> tuple[float, float, int]:
    """Nats, bytes and tokens of the answers in DIALOGUES, from the logits of single texts."""
    tokenizer = rwkv_peft.Tokenizer(320)
    nats, num_bytes, num_tokens = 0.0, 0, 0
    for text in DIALOGUES:
        tokens = torch.tensor([*tokenizer.encode(text), 0])
        with torch.no_grad():
            losses = -model(tokens[None, :-1])[0][0].log_softmax(-1)
        losses = losses.gather(1, tokens[1:, None]).squeeze(1).double()
        # the vocabulary of the small model has single bytes and a few short tokens
        begins = len(tokenizer.encode(text.partition("Assistant:")[0] + "Assistant:"))
        kept = slice(begins - 1, None)
        nats += losses[kept].sum().item()
        num_tokens += len(losses[kept])
        num_bytes += len(tokenizer.decode_bytes(tokens[begins:-1].tolist()))
    return nats, num_bytes, num_tokens


@pytest.mark.parametrize("dataload", ["pack", "pad"])
def test_an_evaluation_is_that_of_the_trained_model_over_the_trained_spans(
    dataload: str, run: Run, tmp_path: Path
) -> None:
    result = run(dataload=dataload)
    written = lines_of(tmp_path / "out" / "val_data.jsonl")
    steps = [row["step"] for row in written]
    assert steps == [0, result.steps // 2, result.steps]
    assert [row["epoch"] for row in written] == [0, 0, 1]
    base = rwkv_peft.load_model(tmp_path / "base.pth")
    tuned = rwkv_peft.load_model(tmp_path / "base.pth", adapter=result.adapter)
    for row, model in ((written[0], base), (written[-1], tuned)):
        nats, num_bytes, num_tokens = measure_answers(model)
        assert row["tokens"] == num_tokens
        assert row["loss"] == pytest.approx(nats / num_tokens, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert [x.loss for x in result.evaluations] == [row["loss"] for row in written]
    log = (tmp_path / "out" / "train_log.txt").read_text(encoding="utf-8")
    assert log.count(" evaluation: loss") == 4 and "bits per byte" in log


def results_of(result: Result, method: str) -> dict[str, torch.Tensor]:
    if method in ("none", "state"):
        return read_weights(result.weights)
    return read_adapter(result.adapter).tensors


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"peft_config": {"r": 4, "lora_dropout": 0.3}}),
        ("lora", {"peft_config": {"r": 4, "use_dora": True}, "dataload": "pad"}),
        ("miss", {"peft_config": {"r": 4, "init_weights": "bat"}, "precision": "bf16"}),
        ("adalora", {"peft_config": {}}),
        ("none", {"peft_config": {}, "dataload": "get", "grad_cp": 1, "lr_init": 1e-3}),
        ("state", {"peft_config": {}, "num_workers": 1}),
    ],
)
def test_evaluation_changes_no_bit_of_training(
    method: str, changes: Any, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("row 3:\n\nUser: hi\n", encoding="utf-8")
    changes = {"peft": method, "merge": 0, **changes}
    plain = run(**changes, val_file="", proj_dir=str(tmp_path / "plain"))
    plain_draw = torch.rand(3)
    watched = run(**changes, val_every_steps=1, val_prompts=str(tmp_path / "prompts.txt"))
    assert torch.equal(torch.rand(3), plain_draw)
    assert watched.steps == plain.steps == len(watched.evaluations) - 1 >= 2
    expected, found = results_of(plain, method), results_of(watched, method)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_split_off_documents_are_not_trained(run: Run, config: TrainConfig) -> None:
    with_all, _ = prepare_run(replace(config, val_file=""))
    split, lines = prepare_run(replace(config, val_file="", val_split=0.3))
    kept, aside = split.plan.batches.documents, split.validation.documents
    assert len(kept) + len(aside) == len(with_all.plan.batches.documents) == 8
    trained = {x for i in range(len(split.plan.batches)) for x in split.plan.batches[i].lines}
    assert trained == set(kept.lines[kept.indices].tolist())
    assert not trained & set(aside.lines[aside.indices].tolist()) and len(aside)
    assert any(line.startswith(f"validation: {len(aside)} documents") for line in lines)


def test_the_best_evaluation_is_kept(run: Run, tmp_path: Path) -> None:
    # so high a rate that it comes to overshoot
    result = run(epoch_count=4, lr_init=0.1, lr_final=0.1, val_every_steps=1)
    after = result.evaluations[1:]
    best = min(after, key=lambda x: x.loss)
    assert best is not after[-1]
    assert [x for x in after if x.is_best][-1] == best and not result.evaluations[0].is_best
    out = tmp_path / "out"
    assert result.best.weights == out / "rwkv-best.pth"
    assert result.best.adapter == out / "rwkv-best-adapter"
    adapted = rwkv_peft.load_model(tmp_path / "base.pth", adapter=result.best.adapter)
    nats, _, num_tokens = measure_answers(adapted)
    assert nats / num_tokens == pytest.approx(best.loss, rel=1e-5)
    merged = rwkv_peft.load_model(out / "rwkv-best.pth")
    nats, _, num_tokens = measure_answers(merged)
    assert nats / num_tokens == pytest.approx(best.loss, rel=0.02)
    assert f"after step {best.step}, saved {out / 'rwkv-best.pth'}" in (
        out / "train_log.txt"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "names"),
    [("none", ["rwkv-best.pth"]), ("state", ["rwkv-best.pth"]), ("lora", ["rwkv-best-adapter"])],
)
def test_the_best_is_kept_as_the_run_saves(method: str, names: list[str], run: Run) -> None:
    options = {"r": 4} if method == "lora" else {}
    result = run(peft=method, peft_config=options, merge=0, lr_init=1e-3, lr_final=1e-3)
    assert sorted(p.name for p in result.proj_dir.glob("rwkv-best*")) == names
    again = run(peft=method, peft_config=options, merge=0, overwrite=1, val_file="", epoch_count=1)
    assert not list(again.proj_dir.glob("rwkv-best*"))


def test_a_run_ends_when_evaluations_get_no_better(run: Run, tmp_path: Path) -> None:
    still = {"lr_init": 0.0, "lr_final": 0.0, "epoch_count": 20, "val_every_steps": 1}
    result = run(**still, early_stopping_patience=3)
    assert [x.is_best for x in result.evaluations] == [False, True, False, False, False]
    assert result.steps == 4 and result.best.weights.exists()
    log = (tmp_path / "out" / "train_log.txt").read_text(encoding="utf-8")
    assert "stopped early: 3 evaluations in a row were no better" in log


def test_what_a_validation_knows_can_be_taken_up(config: TrainConfig) -> None:
    runs = [prepare_run(replace(config, early_stopping_patience=2))[0] for _ in range(2)]
    first, second = runs
    for step in (0, 3, 5, 7):
        first.validation.evaluate(first.model, first.target, step, 0)
    assert first.validation.is_enough and first.is_done and not second.is_done
    state = json.loads(json.dumps(first.validation.state_dict()))
    second.validation.load_state_dict(state)
    assert second.validation.evaluations == first.validation.evaluations
    assert second.is_done and second.validation.best.step == 3
    assert not second.validation.is_due(7, is_epoch_end=True)
    assert "validation" in first.state_dict()


def test_evaluation_has_the_shapes_of_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, make_data_file: Any
) -> None:
    shapes, hidden = set(), RWKV.hidden

    def spy(self: RWKV, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.add((tuple(tokens.shape), kwargs["segment_ids"] is None))
        return hidden(self, tokens, *args, **kwargs)

    monkeypatch.setattr(RWKV, "hidden", spy)
    run(val_file=str(make_data_file(["one text"], name="one.jsonl")), loss_mask="none", merge=0)
    assert shapes == {((4, 48), False)}


def test_prompts_are_continued_greedily_at_each_evaluation(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "row 3:\n"}, {"user": "What is 3?"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run(val_file="", val_prompts=str(prompts))
    assert result.evaluations == () and not (tmp_path / "out" / "val_data.jsonl").exists()
    written = lines_of(tmp_path / "out" / "val_samples.jsonl")
    steps = [0, result.steps // 2, result.steps]
    assert [row["step"] for row in written] == [step for step in steps for _ in rows]
    model = rwkv_peft.load_model(tmp_path / "base.pth", adapter=result.adapter)
    greedy = rwkv_peft.generation.sampling.Sampling(temperature=0)
    template = rwkv_peft.data.templates.TEMPLATES["chat"]
    for row, prompt, stops in (
        (written[-2], "row 3:\n", ()),
        (written[-1], "User: What is 3?\n\nAssistant:", template.stops),
    ):
        expected = rwkv_peft.generate(model, prompt, max_tokens=6, sampling=greedy, stop=stops)
        assert row["text"] == expected and row["state"] == ""
    assert written[1]["prompt"] == "What is 3?"
    log = (tmp_path / "out" / "train_log.txt").read_text(encoding="utf-8")
    assert log.count("sample: ") == 6


def test_each_state_answers_the_prompts(run: Run, tmp_path: Path) -> None:
    rows = [{"text": f"a b c {n}", "state": ("poet", "clerk")[n % 2]} for n in range(8)]
    data = tmp_path / "states.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a b\n", encoding="utf-8")
    result = run(
        peft="state",
        peft_config={},
        data_file=str(data),
        val_file=str(data),
        loss_mask="none",
        val_prompts=str(tmp_path / "prompts.txt"),
        epoch_count=1,
    )
    states = [row["state"] for row in lines_of(tmp_path / "out" / "val_samples.jsonl")]
    assert states == ["clerk", "poet"] * 2
    names = sorted(p.name for p in (tmp_path / "out").glob("rwkv-*"))
    assert names == [f"rwkv-{x}-{n}.pth" for x in ("0", "best") for n in ("clerk", "poet")]
    assert result.evaluations[-1].loss < result.evaluations[0].loss


WRONG = {
    "both sets": ({"val_split": 0.1}, "exclude each other"),
    "a share": ({"val_file": "", "val_split": 1.5}, "must lie in [0, 1)"),
    "nothing to wait for": ({"val_file": "", "early_stopping_patience": 2}, "needs --val_file"),
    "nothing to evaluate": ({"val_file": "", "val_every_steps": 2}, "nothing to evaluate"),
    "negative": ({"val_every_steps": -1}, "--val_every_steps must not be below 0"),
    "no file": ({"val_file": "none.jsonl"}, "--val_file: there is no file none.jsonl"),
    "no prompts": ({"val_prompts": "none.txt"}, "--val_prompts none.txt cannot be read"),
    "one document": ({"val_file": "", "val_split": 0.5, "data_file": "ONE"}, "one document"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_wish_is_one_line_and_leaves_nothing(
    name: str, cli: Callable[..., SimpleNamespace], config: TrainConfig, make_data_file: Any
) -> None:
    changes, message = WRONG[name]
    one = str(make_data_file(["a lone text"], name="one.jsonl"))
    values = {"val_file": config.val_file, **changes}
    values = {key: one if value == "ONE" else value for key, value in values.items()}
    flags = [f"--{key}={value}" for key, value in values.items() if value != ""]
    files = ["--load_model", config.load_model, "--proj_dir", config.proj_dir]
    files += [] if "data_file" in values else ["--data_file", config.data_file]
    done = cli("train", *files, *flags)
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err
    assert not Path(config.proj_dir).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no prompt"), ("\n \n", "holds no prompt"), ('{"text": "x"}', "has no prompt")],
)
def test_prompts_that_cannot_be_read_are_refused(
    content: str, message: str, config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        prepare_run(replace(config, val_prompts=str(tmp_path / "p.jsonl")))


def test_what_is_evaluated_on_is_an_input_that_is_not_written_over(
    run: Run, make_data_file: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    held = make_data_file(DIALOGUES, name="out/val_data.jsonl")
    before = held.read_bytes()
    with pytest.raises(ConfigError, match=r"write over val_data\.jsonl"):
        run(val_file=str(held))
    own = out / "rwkv-best.pth"
    own.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"holds rwkv-best\.pth"):
        run()
    assert held.read_bytes() == before and own.read_bytes() == b"mine"


def test_a_resumed_run_evaluates_as_one_that_never_stopped(
    config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("row 3:\n", encoding="utf-8")
    config = replace(
        config,
        merge=0,
        epoch_count=4,
        lr_init=0.1,
        lr_final=0.1,
        val_every_steps=3,
        val_prompts=str(tmp_path / "prompts.txt"),
        early_stopping_patience=3,
        peft_config={"r": 4, "lora_dropout": 0.3},
    )
    whole = train(replace(config, proj_dir=str(tmp_path / "whole")))
    # in the middle of an epoch, at its end, and where an evaluation is due
    parts = run_in_parts(config, tmp_path, 3, 4, 5)
    assert_same(parts.proj_dir, whole.proj_dir)
    for name in ("val_data.jsonl", "val_samples.jsonl"):
        kept, found = (lines_of(x.proj_dir / name) for x in (whole, parts))
        assert [{**x, "t_cost": 0} for x in found] == [{**x, "t_cost": 0} for x in kept]
    assert whole.evaluations and parts.best.adapter.exists()


def test_the_best_of_a_course_that_was_given_up_is_not_taken_for_the_best(
    config: TrainConfig, tmp_path: Path
) -> None:
    out, names = tmp_path / "out", ["lr_init", "lr_final", "val_every_steps"]
    config = replace(config, lr_init=0.1, lr_final=0.1, epoch_count=4, merge=0)
    first = train(replace(config, val_every_steps=1, save_every_steps=1, keep=0))
    assert first.steps == 8 and first.evaluations[7].is_best and first.best

    # the folder by another name is the same folder
    options = {"proj_dir": str(out / ".." / "out"), "save_every_steps": 1, "keep": 0}

    def go_on(step: int, rate: float, every: int) -> Result:
        where = str(out / "checkpoints" / f"step-{step:06d}")
        rates = {"lr_init": rate, "lr_final": rate, "val_every_steps": every}
        return train(replace(config, **options, **rates, resume=where, resume_changes=names))

    worse = go_on(5, 3.0, 100)
    assert not worse.evaluations[-1].is_best and worse.best is None
    assert not list(out.glob("rwkv-best*"))
    log = (out / "train_log.txt").read_text(encoding="utf-8")
    assert "after step 4; it was made before the run was resumed, and" in log

    unmoved = go_on(2, 0.0, 1)
    assert [x.step for x in unmoved.evaluations if x.is_best][-1] == 2 and unmoved.best
    kept, last = read_adapter(unmoved.best.adapter), read_adapter(unmoved.adapter)
    assert all(torch.equal(x, last.tensors[n]) for n, x in kept.tensors.items())


def test_long_rows_are_evaluated_in_chunks_that_hand_the_state_on(run: Run) -> None:
    changes = {"merge": 0, "epoch_count": 1, "ctx_len": 128}
    whole = run(**changes).evaluations[-1]
    changes |= {"train_type": "infctx", "chunk_ctx": 16, "bptt_chunks": "all"}
    chunked = run(**changes, overwrite=1).evaluations[-1]
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_evaluation_compiles_nothing_more(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    (tmp_path / "prompts.txt").write_text("row 3:\n", encoding="utf-8")
    monkeypatch.setattr(
        "rwkv_peft.training.prepare.compile_blocks", partial(compile_blocks, backend="eager")
    )
    # the losses of the head are compiled by inductor, which takes longer than all else
    monkeypatch.setattr("rwkv_peft.loss._compile", lambda function: function)
    counts, adapters = [], []
    changes = {"compile": 1, "merge": 0, "epoch_count": 1}
    watched = {"val_every_steps": 1, "val_prompts": str(tmp_path / "prompts.txt"), "overwrite": 1}
    for more in ({"val_file": ""}, watched):
        torch._dynamo.reset()
        counters.clear()
        result = run(**changes, **more)
        counts.append((counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]))
        adapters.append(read_adapter(result.adapter).tensors)
    torch._dynamo.reset()
    assert counts[0] == counts[1] and counts[0][0] > 0
    assert all(torch.equal(adapters[1][name], x) for name, x in adapters[0].items())
