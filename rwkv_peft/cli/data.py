"""`rwkv-peft data FILE…` and `rwkv-peft data prepare FILE`"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_peft.cli.arguments import join_arguments, split_arguments
from rwkv_peft.cli.given import find_kind, require_data
from rwkv_peft.cli.legacy.data import translate_data
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import DataConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import escape, print_json, print_line

if TYPE_CHECKING:
    from rwkv_peft.data.documents import Documents
    from rwkv_peft.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class DataOptions(DataConfig):
    """What to look at; the settings are those of train."""

    ctx_len: int = 0
    """Counts documents that are longer; they are split in training, not cut."""
    show: int = 3
    """Documents to show, trained tokens in colour, or between « and » where there are none."""
    json: bool = False
    """Print one JSON object; its `rows` hold where, tokens, text and trained, a boolean a token."""
    load_model: str = ""
    """The model to train, whose vocabulary is used."""
    vocab_size: int = 0
    """Vocabulary of the model; 0: that of load_model, or 65536 without one."""


def run(args: Sequence[str]) -> int:
    """Says what training would see: formats, tokens, lengths, what is left out, examples."""
    if args[:1] == ["prepare"]:
        from rwkv_peft.cli.prepare import run as prepare

        return prepare(args[1:])
    loose, flags = split_arguments(args)
    # several files may be given one after the other
    files = [",".join(loose)] if loose else []
    saved = _saved_settings(loose[0]) if len(loose) == 1 else {}
    arguments = translate_data(join_arguments([] if saved else files, flags))
    options = parse(
        DataOptions, arguments, command="data", positional=("data_file",), defaults=saved
    )
    if options.ctx_len < 0 or options.show < 0:
        raise ConfigError("--ctx_len and --show must not be below 0")

    from rwkv_peft.data.prepare import read_documents
    from rwkv_peft.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(_find_vocab_size(options))
    documents = read_documents(options, tokenizer)
    shown = list(rows_of(documents, tokenizer, options.show))
    if options.json:
        print_json({**_facts(documents, options, tokenizer.vocab_size), "rows": shown})
        return 0
    for name, value in _facts(documents, options, tokenizer.vocab_size).items():
        if name not in ("bad", "empty", "untrained", "duplicates", "remarks", "notes"):
            print_line(f"{name:<16} {_plain(value)}")
    if not options.load_model and not options.vocab_size:
        print_line(
            "data: counted with the vocabulary of RWKV World; --load_model takes a model's own"
        )
    for line in documents.report.describe(documents.paths):
        print_line(line)
    show_rows(shown, tokenizer)
    return 0


def _saved_settings(path: str) -> dict[str, Any]:
    """The settings of a run if its folder stands in the place of the data; {} if data does.

    Raises:
        ConfigError: it is a model, an adapter or a state.
    """
    kind = find_kind(path)
    if kind == "run":
        from rwkv_peft.training.folder import read_settings

        if (saved := read_settings(Path(path))) is None:
            raise ConfigError(
                f"{path} is the folder of a run that has not taken its first step: its data is "
                "not noted there yet"
            )
        print_line(f"note: the data of the run {path}: {saved.get('data_file')}", file=sys.stderr)
        return saved
    require_data(path, "rwkv-peft data data.jsonl --load_model model.pth")
    return {}


def _find_vocab_size(options: DataOptions) -> int:
    """The vocabulary named, or the model's, or that of RWKV World."""
    if not options.load_model:
        return options.vocab_size or 65536
    from rwkv_peft.checkpoint.pth import infer_model_config, read_weights

    own = infer_model_config(read_weights(options.load_model)).vocab_size
    if options.vocab_size not in (0, own):
        raise ConfigError(
            f"--vocab_size {options.vocab_size}: {options.load_model} has a vocabulary of {own}; "
            "give one of the two"
        )
    return own


def _facts(documents: "Documents", options: DataOptions, vocab_size: int) -> dict[str, Any]:
    import numpy as np

    report, paths = documents.report, documents.paths
    lengths = np.diff(documents.starts) - 1
    edges = 2 ** np.arange(4, max(5, int(lengths.max()).bit_length()) + 1)
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    return {
        "files": list(paths),
        "format": report.forms,
        "template": options.template_name,
        "loss_mask": options.loss_mask,
        "vocab_size": vocab_size,
        "num_rows": report.num_rows,
        "documents": len(documents),
        "tokens": len(documents.tokens),
        "trained_tokens": documents.num_trained,
        "longest": documents.longest,
        "over_long": int((lengths > options.ctx_len).sum()) if options.ctx_len else 0,
        "lengths": {
            f"<={edge}": count
            for edge, count in zip(edges.tolist(), counts.tolist(), strict=True)
            if count
        },
        "bad": list(report.bad),
        "empty": report.empty.describe(paths),
        "untrained": report.untrained.describe(paths),
        "duplicates": report.duplicates.describe(paths),
        "remarks": {name: places.describe(paths) for name, places in report.remarks.items()},
        "notes": list(report.notes),
    }


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count:,}" for key, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f", ... ({len(value):,})" if value[5:] else "")
    return f"{value:,}" if isinstance(value, int) else str(value)


def rows_of(documents: "Documents", tokenizer: "Tokenizer", count: int) -> Iterator[dict[str, Any]]:
    """The first documents with their text, their tokens and which of them are trained."""
    for i in documents.indices[:count].tolist():
        start, end = documents.starts[i], documents.starts[i + 1]
        tokens = documents.tokens[start:end].tolist()
        weights = [1] * len(tokens)
        if documents.weights is not None:
            weights = documents.weights[start:end].tolist()
        # nothing stands before the first token, so that it cannot be a target
        trained = [False, *(weight > 0 for weight in weights[1:])]
        where = documents.where(i)
        yield {
            "where": where,
            "tokens": tokens,
            # ids of another tokenizer have no text here
            "text": "" if tokenizer.is_foreign else tokenizer.decode(tokens),
            "trained": trained,
        }


def show_rows(rows: Sequence[dict[str, Any]], tokenizer: "Tokenizer") -> None:
    """Prints documents, what is trained in green; ∎ is the end of a document."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        text = Text(f"\n--- {escape(row['where'])}\n", style="dim")
        for is_trained, part in _stretches(row, tokenizer):
            part = escape(part, keeps="\n\t")
            if is_trained and (console.no_color or not console.color_system):
                part = f"«{part}»"
            text.append(part, style="not dim green" if is_trained else "not dim")
        console.print(text)


def _stretches(row: dict[str, Any], tokenizer: "Tokenizer") -> Iterator[tuple[bool, str]]:
    """The text of a row in stretches that are all trained or all not."""
    held, is_held_trained = b"", False
    for token, is_trained in zip(row["tokens"], row["trained"], strict=True):
        if held and is_trained != is_held_trained:
            yield is_held_trained, held.decode("utf-8", "replace")
            held = b""
        text = f"{token} ".encode() if tokenizer.is_foreign else tokenizer.token_bytes(token)
        held, is_held_trained = held + (text or "∎".encode()), is_trained
    yield is_held_trained, held.decode("utf-8", "replace")
