"""Every method learns in a 16-bit type, whose trained tensors lie in flat buffers."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

from rwkv_peft.config import TrainConfig
from rwkv_peft.training.run import train
from tests.methods.test_catalog import CASES

# of a few steps these make little of the 5.9 that the loss is at first
LITTLE = ("adalora", "c3a", "ia3", "pvera", "road", "tinylora", "unilora", "vera")


# they take a minute each
SLOW = ("boft", "hra")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in CASES]
)
def test_a_method_learns_in_bf16(
    case: str, make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    name, options = CASES[case]
    if name == "trainable_tokens":
        options = {"token_indices": [ord(x) + 1 for x in "andrsw "]}
    # it is the run that knows how many steps there are
    options = {key: value for key, value in options.items() if key != "total_step"}
    config = TrainConfig(
        load_model=str(make_model_file()),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        peft=name,
        peft_config=options,
        dataload="pad",
        epoch_count=3,
        micro_bsz=2,
        ctx_len=48,
        lr_init=1e-2,
        precision="bf16",
        accelerator="cpu",
        merge=False,
        random_seed=0,
    )
    train(config)
    text = (tmp_path / "out" / "loss_data.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()]
    first, last = (mean(x["loss"] for x in steps if x["epoch"] == epoch) for epoch in (0, 2))
    assert last < first - (1e-3 if case in LITTLE else 0.1)
