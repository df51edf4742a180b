"""Learned initial states."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.checkpoint.state import write_state
from rwkv_peft.config import TrainConfig
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.training.run import train

TOKENS = torch.arange(1, 25).view(1, 24)
SIXTH: dict[str, Any] = {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448}
VERSIONS: dict[str, dict[str, Any]] = {"5.2": {"version": "x052", "ranks": {}}, "6": SIXTH, "7": {}}


def drawn(states: LearnedStates) -> None:
    generator = torch.Generator().manual_seed(5)
    for p in states.values():
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_of_a_state_equals_finite_differences(
    version: str, is_full: bool, make_model_file: Callable[..., Path]
) -> None:
    model = rwkv_peft.load_model(make_model_file(**VERSIONS[version]), dtype="float64")
    states = LearnedStates(model, is_full=is_full)
    for p in states.values():
        p.data = p.data.double()
    drawn(states)
    for p in states.values():
        p.data = p.data.double()

    def loss() -> torch.Tensor:
        return model(TOKENS, states.rows([""]))[0].square().sum()

    gradients = torch.autograd.grad(loss(), list(states.values()))
    assert all(g.abs().max() > 0 for g in gradients)
    for p, gradient in zip(states.values(), gradients, strict=True):
        step = 1e-6 * torch.sign(gradient)
        ends = []
        for sign in (1, -2):
            p.data += sign * step
            ends.append(loss())
        p.data += step
        difference = (ends[0] - ends[1]) / 2
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=1e-12)


@torch.no_grad()
def test_a_learned_state_gives_its_logits_in_the_official_runtime(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    from rwkv.model import RWKV

    base = make_model_file(dtype=torch.float32)
    model = rwkv_peft.load_model(base)
    states = LearnedStates(model)
    drawn(states)
    ours = model(TOKENS, states.rows([""]))[0][0]
    assert (ours - model(TOKENS)[0][0]).abs().max() > 1e-2
    write_state(tmp_path / "state.pth", states)
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    assert list(saved) == [f"blocks.{i}.att.time_state" for i in range(2)]
    official = RWKV(model=str(base.with_suffix("")), strategy="cpu fp32")
    state = official.generate_zero_state()
    for i in range(2):
        state[i * 3 + 1] = saved[f"blocks.{i}.att.time_state"]
    logits, _ = official.forward(TOKENS[0].tolist(), state, full_output=True)
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_merged_state_gives_its_logits_where_rwkv6_files_carry_it(
    make_model_file: Callable[..., Path],
    tmp_path: Path,
    official_logits: Callable[..., torch.Tensor],
) -> None:
    base = make_model_file(dtype=torch.float32, **SIXTH)
    model = rwkv_peft.load_model(base)
    states = LearnedStates(model)
    drawn(states)
    ours = model(TOKENS, states.rows([""]))[0][0]
    write_state(tmp_path / "state.pth", states)
    rwkv_peft.merge(base, tmp_path / "state.pth", tmp_path / "merged.pth")
    merged = rwkv_peft.load_model(tmp_path / "merged.pth")(TOKENS)[0][0]
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)
    official = official_logits(tmp_path / "merged.pth", TOKENS[0].tolist(), "x060")
    torch.testing.assert_close(official, ours, rtol=0, atol=1e-4)


def test_rows_of_several_states_begin_each_with_its_own(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    states = LearnedStates(model, ("a", "b", "c"))
    drawn(states)
    tokens = TOKENS.expand(3, -1)
    together = model(tokens, states.rows(["b", "a", "b"]))[0]
    together[1].sum().backward()
    for row, name in enumerate("bab"):
        alone = model(TOKENS, states.rows([name]))[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert all(
        (p.grad is not None and p.grad.any()) == n.startswith("a/") for n, p in states.items()
    )


@pytest.mark.parametrize("peft", ["state", "auto"])
def test_a_run_of_state_tuning_lowers_the_loss_and_saves_the_state_alone(
    peft: str, model_file: Path, data_file: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    result = train(
        TrainConfig(
            load_model=str(model_file),
            data_file=str(data_file),
            proj_dir=str(tmp_path / "out"),
            peft=peft,
            train_type="state",
            epoch_count=2,
            precision="fp32",
            accelerator="cpu",
            random_seed=0,
        )
    )
    assert result.weights is not None and result.adapter is None
    saved = read_weights(result.weights)
    assert list(saved) == [f"blocks.{i}.att.time_state" for i in range(2)]
    assert all(x.any() and x.shape == (2, 64, 64) for x in saved.values())
    assert rwkv_peft.load_model(model_file, state=result.weights).initial_state is not None
    begin = ["generate", "--load_model", model_file, "--prompt", "row 1", "--max_tokens", 8]
    texts = [cli(*begin, *more) for more in ([], ["--state", result.weights])]
    assert [done.code for done in texts] == [0, 0]


def test_states_trained_together_are_what_each_is_alone(model_file: Path, tmp_path: Path) -> None:
    # a step of three rows of a mixed file holds one of each state, of unequal lengths
    texts = {
        "poet": ["the moon", "a rose is a rose is a rose", "oh", "no more, no more"],
        "clerk": ["row 1, column 2: 17.50", "paid", "see the letter of 3 May", "filed"],
        "": ["just a text", "and another that is a little longer", "a third", "the end"],
    }
    rows = {name: [{"text": t, "state": name} for t in own] for name, own in texts.items()}
    together = [row for step in zip(*rows.values(), strict=True) for row in step]

    def states_of(name: str, own: list[dict[str, str]], micro_bsz: int) -> dict[str, Any]:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        result = train(
            TrainConfig(
                load_model=str(model_file),
                data_file=str(data),
                proj_dir=str(tmp_path / name),
                peft="state",
                data_shuffle=0,
                micro_bsz=micro_bsz,
                epoch_count=5,
                lr_init=1e-2,
                grad_clip=0.3,
                precision="fp32",
                accelerator="cpu",
                random_seed=0,
            )
        )
        assert result.steps == 20 and result.weights is not None
        return {p.stem: read_weights(p) for p in result.weights.parent.glob("rwkv-4*.pth")}

    found = states_of("together", together, 3)
    assert set(found) == {"rwkv-4", "rwkv-4-poet", "rwkv-4-clerk"}
    for name, own in rows.items():
        stem = "rwkv-4" + "-" * bool(name) + name
        alone = states_of(f"alone{name}", own, 1)[stem]
        for key, value in alone.items():
            assert value.abs().max() > 1e-2
            torch.testing.assert_close(found[stem][key], value, rtol=0, atol=1e-5)
    assert not torch.allclose(
        found["rwkv-4"]["blocks.0.att.time_state"],
        found["rwkv-4-poet"]["blocks.0.att.time_state"],
        atol=1e-2,
    )
