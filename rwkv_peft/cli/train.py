"""`rwkv-peft train model.pth data.jsonl`"""

from collections.abc import Sequence

from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TrainConfig


def run(args: Sequence[str]) -> int:
    """Trains, and exits with 128 + the number of a signal that ended the run early."""
    config = parse(TrainConfig, args, command="train", positional=("load_model", "data_file"))
    config.require_files()

    from rwkv_peft.training.loop import train

    result = train(config)
    return 128 + result.signal if result.signal else 0
