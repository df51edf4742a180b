"""Arguments of `data` and `data prepare` as older programs had them."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_peft.cli.arguments import join_arguments, split_arguments
from rwkv_peft.cli.legacy.train import DEAD
from rwkv_peft.errors import ConfigError

# flags of json2binidx's preprocess_data.py -> ours, and those that only had one useful value
RENAMED = {"input": "data_file", "output_prefix": "output", "workers": "prepare_workers"}
ONLY_VALUES = {
    "dataset_impl": "mmap",
    "tokenizer_type": "RWKVTokenizer",
    "jsonl_keys": "text",
    "log_interval": None,
}
# the vocabulary that every RWKV has, which is bundled
VOCABULARY = "rwkv_vocab_v20230424.txt"


def translate_data(arguments: Sequence[str]) -> list[str]:
    """Arguments of `data` in today's flags; those of training that are dead are left out."""
    positional, flags = split_arguments(arguments)
    return join_arguments(positional, [flag for flag in flags if flag[0] not in DEAD])


def translate_prepare(arguments: Sequence[str]) -> list[str]:
    """Arguments of json2binidx's preprocess_data.py or RWKV-LM's make_data.py in today's flags.

    Raises:
        ConfigError: a flag has a value that cannot be honoured.
    """
    positional, flags = split_arguments(arguments)
    if len(positional) == 3 and not flags:
        # make_data.py FILE N_EPOCH CTX_LEN
        file, copies, ctx_len = positional
        if not (copies.isdecimal() and ctx_len.isdecimal()):
            raise ConfigError(f"{' '.join(arguments)}: the old form is FILE N_EPOCH CTX_LEN")
        return [file, "--copies", copies, "--ctx_len", ctx_len]
    today = []
    for name, words in flags:
        value = " ".join(words)
        if name == "ftfy" and not words:
            raise ConfigError("--ftfy: repair the texts first, with the ftfy package")
        if name == "append_eod" and not words:
            words = ["1"]
        if name in ONLY_VALUES:
            if ONLY_VALUES[name] not in (None, value):
                raise ConfigError(f"--{name} {value}: only {ONLY_VALUES[name]} can be used")
            continue
        if name in ("vocab", "vocab_file"):
            if Path(value).name == VOCABULARY:
                continue
            name = "vocab_file"
        if name == "output_prefix" and words:
            words = [f"{value}_text_document"]
        today.append((RENAMED.get(name, name), words))
    return join_arguments(positional, today)
