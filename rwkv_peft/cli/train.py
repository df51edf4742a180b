"""`rwkv-peft train model.pth data.jsonl`"""

import sys
from collections.abc import Sequence

from rwkv_peft.cli.legacy import translate
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TrainConfig


def run(args: Sequence[str]) -> int:
    """Trains, and exits with 128 + the number of a signal that ended the run early."""
    arguments, notes = translate(args)
    config = parse(TrainConfig, arguments, command="train", positional=("load_model", "data_file"))
    config.require_files()
    for note in notes:
        print(f"note: {note}", file=sys.stderr)

    from rwkv_peft.training.run import train

    result = train(config)
    return 128 + result.signal if result.signal else 0
