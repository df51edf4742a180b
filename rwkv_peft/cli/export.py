"""`rwkv-peft export MODEL --to gguf`"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rwkv_peft.cli.generate import choose_template
from rwkv_peft.cli.given import (
    Kind,
    describe_base,
    describe_result,
    find_kind,
    find_parts,
    find_result,
    find_whole,
    require_no_log,
)
from rwkv_peft.cli.options import AdapterOptions
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import Switch
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_line


@dataclass(frozen=True, slots=True)
class ExportOptions(AdapterOptions):
    """What to write for other programs."""

    source: str = ""
    """A model's file, the folder of a run, an adapter or a state."""
    to: Literal["", "gguf", "st", "bin", "hf", "hf-fla", "pth"] = ""
    """gguf: llama.cpp, Ollama, LM Studio, koboldcpp. st: Ai00, web-rwkv. bin: rwkv.cpp. hf, hf-fla:
    Hugging Face folders in the native layout and in fla's. pth: rwkv, RWKV-Runner, ChatRWKV."""
    dtype: str = ""
    """Type of the numbers; what each format holds stands in docs/exports.md."""
    base_model: str = ""
    """The official weights that an adapter was trained on; those that it names if left out."""
    output: str = ""
    """The file or folder to write; named after the source in the current folder if left out."""
    merge: Switch = 1
    """0 writes an adapter by itself, as a LoRA file of Ai00, with --to st."""
    template: str = "auto"
    """How turns are written: a name or a Jinja file; as in the model's training if auto."""
    overwrite: Switch = 0
    """1 replaces what has this name, if it is nothing that is read."""


def run(args: Sequence[str]) -> int:
    """Writes a model for another program, and says what it was compared with."""
    options = parse(ExportOptions, args, command="export", positional=("source",))
    if not options.source or not options.to:
        raise ConfigError(
            f"--{'to' if options.source else 'source'} is missing: rwkv-peft export model.pth "
            "--to gguf (or st, bin, hf, hf-fla, pth)"
        )
    options = _complete(options)

    from rwkv_peft.checkpoint.older import LegacyAdapterHints
    from rwkv_peft.exports.export import export
    from rwkv_peft.exports.formats import FORMATS

    if options.template != "auto" and not FORMATS[options.to].has_template:
        raise ConfigError(f"--template: files of --to {options.to} hold none: leave it out")
    report = export(
        options.source,
        options.output,
        options.to,
        dtype=options.dtype,
        base_model=options.base_model,
        template=choose_template(options.template, options.source),
        hints=LegacyAdapterHints(options.lora_alpha, options.pissa_init),
        merge=bool(options.merge),
        force=options.force,
        overwrite=bool(options.overwrite),
    )
    for line in report.lines():
        print_line(line)
    return 0


def _find_finest(run: Path, kind: Kind, options: ExportOptions) -> Path:
    """The newest result of a run: its adapter, as a merged file lacks what was rounded off.

    The merged file where the adapter's base is not known or gone.
    """
    result = find_result(run, kind, "export", wants_adapter=True)
    if options.base_model or not options.merge:
        return result
    try:
        find_parts(str(result), "export")
    except ConfigError:
        return find_result(run, kind, "export")
    return result


def _complete(options: ExportOptions) -> ExportOptions:
    """The options with a run's newest result in its place, and with the base of an adapter."""
    options, note = replace(options, source=find_whole(options.source)), ""
    kind = find_kind(options.source)
    require_no_log(options.source, "export")
    if kind in ("run", "checkpoint"):
        run = Path(options.source)
        result = _find_finest(run, kind, options)
        note = describe_result(run, result)
        options, kind = replace(options, source=str(result)), find_kind(result)
    if kind == "adapter" and not options.base_model:
        parts = find_parts(options.source, "export")
        note = f"{note}{describe_base(parts)}" if note else parts.note
        options = replace(options, base_model=parts.model)
    if note:
        print_line(f"note: {note}", file=sys.stderr)
    return options
