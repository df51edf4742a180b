"""What the demo's tuning learns on the bundled model in 8 or 4 bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft.cli.demo import DemoOptions, _train_config
from rwkv_peft.quant import STORAGES
from rwkv_peft.training.run import train

# how far the loss on dialogues kept aside may be above that of a dense base, relative to it
ALLOWED = {"int8": 0.01, "nf4": 0.03, "fp8": 0.015}


def held_out_loss(folder: Path, quant: Any) -> float:
    config = _train_config(DemoOptions(), str(folder / quant))
    # what cards train in, and the only dtype of products of FP8
    config = replace(config, quant=quant, precision="bf16", merge=0)
    loss = train(config).evaluations[-1].loss
    assert loss is not None
    return loss


@pytest.mark.slow
def test_the_demos_tuning_learns_as_much_on_a_stored_base(tmp_path: Path) -> None:
    dense = held_out_loss(tmp_path, "none")
    for quant in STORAGES:
        loss = held_out_loss(tmp_path, quant)
        print(f"{quant}: {loss:.4f}, dense {dense:.4f}, {loss / dense - 1:+.2%}")
        # fp4 is told alone
        assert quant not in ALLOWED or loss / dense - 1 <= ALLOWED[quant]
