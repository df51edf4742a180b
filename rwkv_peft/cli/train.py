"""`rwkv-peft train model.pth data.jsonl`"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rwkv_peft.cli.arguments import split_arguments
from rwkv_peft.cli.data import rows_of, show_rows
from rwkv_peft.cli.generate import template_of
from rwkv_peft.cli.given import (
    find_added,
    find_kind,
    find_parts,
    find_run,
    require_data,
    require_model,
    require_no_log,
)
from rwkv_peft.cli.legacy.train import require_agreement, translate_train
from rwkv_peft.cli.parse import parse
from rwkv_peft.cli.ranks import is_first_rank, must_start, start_ranks
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.world import OWN
from rwkv_peft.printing import print_line

# rows of a dry run
SHOWN = 3


@dataclass(frozen=True, slots=True)
class TrainOptions(TrainConfig):
    """Settings of one training run."""

    dry_run: bool = False
    """Do everything but train: say what is chosen, take three steps to know memory and time, show
    rows with what is trained of them, and write nothing."""

    @property
    def config(self) -> TrainConfig:
        """What is said of the run itself."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})


def run(args: Sequence[str]) -> int:
    """Trains, and exits with 128 + the number of a signal that ended the run early."""
    arguments, notes, model_flags = translate_train(args)
    positional = ("load_model", "data_file")
    options = parse(TrainOptions, arguments, command="train", positional=positional)
    config = options.config
    if config.resume:
        from rwkv_peft.training.resume import find_settings

        # what the line does not say is as the run had it
        saved = find_settings(config.resume, config.proj_dir)
        options = parse(
            TrainOptions, arguments, command="train", positional=positional, defaults=saved
        )
        config = options.config
    else:
        config, found = _take_given(config)
        notes += found
    if config.resume == "auto" and config.proj_dir and not config.load_model:
        from rwkv_peft.training.resume import describe_no_checkpoint

        raise ConfigError(describe_no_checkpoint(config.proj_dir))
    config.require_files()

    from rwkv_peft.training.inputs import require_kept_config, require_kept_inputs

    flags = split_arguments(args)[1]
    require_kept_config(
        config, [word for name, words in flags if name == "config" for word in words]
    )
    require_kept_inputs(config)
    speaks = is_first_rank(config)
    for note in notes if speaks else ():
        # of ranks that the command has started it has said it itself
        if OWN not in os.environ:
            print_line(f"note: {note}", file=sys.stderr)
    if model_flags:
        from rwkv_peft.checkpoint.pth import infer_model_config, read_weights

        model_config = infer_model_config(read_weights(config.load_model))
        require_agreement(model_flags, model_config, config.load_model)

    if must_start(config):
        return start_ranks(args, config)
    if options.dry_run:
        return _rehearse(config, speaks)

    from rwkv_peft.training.answers import Answers
    from rwkv_peft.training.ending import describe_ending
    from rwkv_peft.training.run import train

    started = time.monotonic()
    result = train(config, answers=Answers())
    if result.signal:
        return 128 + result.signal
    if speaks:
        for line in describe_ending(result, time.monotonic() - started):
            print_line(line, file=sys.stderr)
    return 0


def _rehearse(config: TrainConfig, speaks: bool) -> int:
    from rwkv_peft.data.tokenizer import Tokenizer
    from rwkv_peft.training.dry_run import dry_run

    run = dry_run(config, lambda line: print_line(line, file=sys.stderr))
    if not speaks:
        return 0
    tokenizer = Tokenizer(run.model.model_config.vocab_size)
    print_line("rows, and what is trained of them:", file=sys.stderr)
    show_rows(list(rows_of(run.plan.batches.documents, tokenizer, SHOWN)), tokenizer)
    return 0


def _take_given(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config with what stands in the place of the model in its own, and notes of that.

    An adapter, a state or the result of a run is trained further, in the run's template.
    """
    first, notes = config.load_model, []
    for path in (config.data_file, config.val_file):
        require_data(path, "rwkv-peft train model.pth data.jsonl")
    if config.load_adapter:
        line = f"rwkv-peft train {first or 'BASE'} {config.data_file or 'data.jsonl'}"
        added, note = find_added(config.load_adapter, "load_adapter", line)
        notes += [note] if note else []
        config = replace(config, load_adapter=added)
    if not first or (kind := find_kind(first)) in ("model", "other"):
        if not config.data_file:
            require_model(first, "train")
        require_no_log(first, "train")
        return config, notes
    if kind in ("run", "checkpoint") and not config.data_file:
        run = first if kind == "run" else str(find_run(Path(first, "rwkv")) or first)
        raise ConfigError(
            f"{first} is the folder of a run, and no data is given: rwkv-peft train --resume auto "
            f"--proj_dir {run} goes on with it, rwkv-peft train {first} data.jsonl trains its "
            "result further on other data"
        )
    parts = find_parts(first, "train", wants_adapter=True)
    further = parts.adapter or parts.state
    if further and config.load_adapter:
        raise ConfigError(f"{first} and --load_adapter {config.load_adapter}: give one of the two")
    notes.append(parts.note)
    template = config.template
    if parts.run and template == "auto" and config.data_type != "sft":
        template = template_of(parts.run)
        notes.append(f"--template {template}, as the run {parts.run} had it")
    config = replace(
        config,
        load_model=parts.model,
        load_adapter=further or config.load_adapter,
        template=template,
    )
    return config, notes
