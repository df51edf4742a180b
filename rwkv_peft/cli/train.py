"""`rwkv-peft train model.pth data.jsonl`"""

import sys
from collections.abc import Sequence

from rwkv_peft.cli.legacy.arguments import split_arguments
from rwkv_peft.cli.legacy.train import require_agreement, translate_train
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TrainConfig
from rwkv_peft.printing import print_line


def run(args: Sequence[str]) -> int:
    """Trains, and exits with 128 + the number of a signal that ended the run early."""
    arguments, notes, model_flags = translate_train(args)
    positional = ("load_model", "data_file")
    config = parse(TrainConfig, arguments, command="train", positional=positional)
    if config.resume:
        from rwkv_peft.training.resume import find_settings

        # what the line does not say is as the run had it
        saved = find_settings(config.resume, config.proj_dir)
        config = parse(
            TrainConfig, arguments, command="train", positional=positional, defaults=saved
        )
    config.require_files()

    from rwkv_peft.training.inputs import require_kept_config, require_kept_inputs

    flags = split_arguments(args)[1]
    require_kept_config(
        config, [word for name, words in flags if name == "config" for word in words]
    )
    require_kept_inputs(config)
    for note in notes:
        print_line(f"note: {note}", file=sys.stderr)
    if model_flags:
        from rwkv_peft.checkpoint.pth import infer_model_config, read_weights

        model_config = infer_model_config(read_weights(config.load_model))
        require_agreement(model_flags, model_config, config.load_model)

    from rwkv_peft.training.run import train

    result = train(config)
    return 128 + result.signal if result.signal else 0
