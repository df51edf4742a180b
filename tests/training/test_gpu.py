import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.loop import train


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_run_on_a_gpu_learns_and_its_file_opens_without_one(
    peft: str,
    precision: str,
    make_model_file: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
) -> None:
    config = TrainConfig(
        load_model=str(make_model_file()),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        dataload="pad",
        peft=peft,  # type: ignore[arg-type]
        epoch_count=6,
        lr_init=1e-3,
        precision=precision,  # type: ignore[arg-type]
        accelerator="gpu",
        op="torch",
        random_seed=0,
    )
    result = train(config)
    lines = (tmp_path / "out" / "loss_data.jsonl").read_text().splitlines()
    assert result.steps == len(lines)
    assert result.loss < 0.96 * json.loads(lines[0])["loss"]
    assert result.weights is not None
    raw = torch.load(result.weights, weights_only=True)
    assert {x.device.type for x in raw.values()} == {"cpu"}
    assert all(x.isfinite().all() for x in read_weights(result.weights).values())
