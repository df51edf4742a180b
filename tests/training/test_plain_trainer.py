"""Training against a trainer written here from the documentation, in plain PyTorch."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.state import RWKVState
from rwkv_peft.training.run import train

TEXTS = [f"line {i}: " + "the cat sat on the mat. " * (1 + i % 3) for i in range(8)]
STEPS, ROWS, RATE, CLIP = 4, 4, 3e-2, 0.005


@pytest.fixture
def config(make_model_file: Callable[..., Path], tmp_path: Path) -> TrainConfig:
    model = make_model_file(dtype=torch.float32)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return TrainConfig(
        load_model=str(model),
        data_file=str(data),
        proj_dir=str(tmp_path / "out"),
        dataload="pad",
        data_shuffle=0,
        ctx_len=512,
        micro_bsz=ROWS,
        epoch_count=STEPS * ROWS // len(TEXTS),
        lr_init=RATE,
        lr_final=RATE,
        warmup_steps=0,
        grad_clip=CLIP,
        l2wrap=0.0,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
        op="reference",
    )


def train_plainly(
    config: TrainConfig,
    parameters: dict[str, torch.Tensor],
    make_state: Callable[[], RWKVState | None],
) -> list[float]:
    """AdamW over the mean loss of all tokens of a step, gradients clipped all together."""
    model = rwkv_peft.load_model(config.load_model, op="reference")
    tokenizer = rwkv_peft.Tokenizer(model.model_config.vocab_size)
    documents = [[*tokenizer.encode(text), 0] for text in TEXTS]
    adamw = torch.optim.AdamW(
        parameters.values(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    norms = []
    for step in range(STEPS):
        rows = [documents[(step * ROWS + i) % len(documents)] for i in range(ROWS)]
        losses = []
        for ids in rows:
            logits, _ = model(torch.tensor([ids[:-1]]), make_state())
            losses.append(F.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="sum"))
        (torch.stack(losses).sum() / sum(len(ids) - 1 for ids in rows)).backward()
        total = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
        norms.append(total)
        for p in parameters.values():
            p.grad.mul_(min(1.0, CLIP / (total + 1e-6)))
        adamw.step()
        adamw.zero_grad()
    return norms


def zero_state(config: TrainConfig, is_full: bool) -> dict[str, torch.Tensor]:
    c = rwkv_peft.load_model(config.load_model).model_config
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(c.n_layer):
        shapes[f"blocks.{i}.att.time_state"] = (c.n_head, c.head_size, c.head_size)
        if is_full:
            shapes[f"blocks.{i}.att.ts_state"] = shapes[f"blocks.{i}.ffn.ts_state"] = (c.n_embd,)
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("is_full", [False, True])
def test_a_state_is_clipped_as_a_whole_and_trained_as_documented(
    is_full: bool, is_named: bool, config: TrainConfig
) -> None:
    changes: dict[str, Any] = {"train_type": "fullstate" if is_full else "state"}
    if is_named:
        rows = [json.dumps({"text": text, "state": "voice"}) for text in TEXTS]
        Path(config.data_file).write_text("\n".join(rows), encoding="utf-8")
    result = train(replace(config, **changes))
    parameters = zero_state(config, is_full)

    def make_state() -> RWKVState:
        layers = range(len([n for n in parameters if n.endswith("time_state")]))
        zeros = torch.zeros(parameters["blocks.0.att.time_state"].shape[0] * 64)
        vectors = [
            torch.stack([parameters.get(f"blocks.{i}.{kind}.ts_state", zeros) for i in layers])
            for kind in ("att", "ffn")
        ]
        wkv = torch.stack([parameters[f"blocks.{i}.att.time_state"] for i in layers])
        return RWKVState(*(x.unsqueeze(1) for x in (*vectors, wkv)))

    norms = train_plainly(config, parameters, make_state)
    lines = (result.proj_dir / "loss_data.jsonl").read_text().splitlines()
    assert [json.loads(line)["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    # clipping was at work
    assert min(norms) > 2 * CLIP
    assert result.weights is not None
    saved = read_weights(result.weights)
    assert set(saved) == set(parameters)
    for name, x in parameters.items():
        torch.testing.assert_close(saved[name], x.detach(), rtol=1e-3, atol=1e-4 * RATE)
