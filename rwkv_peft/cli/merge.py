"""`rwkv-peft merge --base_model B --adapter DIR --output O`"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rwkv_peft.cli.given import (
    find_added,
    find_kind,
    find_parts,
    find_whole,
    refuse_model,
    require_no_log,
)
from rwkv_peft.cli.legacy.merge import translate_merge
from rwkv_peft.cli.options import AdapterOptions
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import Switch
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_line


@dataclass(frozen=True, slots=True)
class MergeOptions(AdapterOptions):
    """Files of a merge."""

    base_model: str = ""
    """The official weights that the adapter was trained on."""
    adapter: str = ""
    """Folder of the adapter in peft's format, a state file, or an adapter file of older RWKV-PEFT;
    several with commas between."""
    weights: list[float] | None = None
    """With which the change of each adapter is added, as a JSON list; 1 each if left out."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Dtype of the file; that of each tensor in the base if keep."""
    merge_base: Literal["trained", "original"] = "trained"
    """Of a base that was trained with --quant: trained adds to what training computed with,
    original to the weights of the file."""
    compare: int = 64
    """Tokens on which the merged file is compared with the adapter model; 0 compares nothing."""
    data_file: str = ""
    """Held-out rows to compare on, in any form that training reads; a built-in text if empty."""
    check_files: Switch = 1
    """1 compares the checksums of .pth files before they are used, at 1 to 3 GB a second and core;
    0 does not."""
    output: str = ""
    """The file to write, .pth or .safetensors."""
    overwrite: Switch = 0
    """1 replaces what has this name, if it is nothing that is read."""


def run(args: Sequence[str]) -> int:
    """Merges an adapter into a copy of its base."""
    arguments, notes, _ = translate_merge(args)
    positional = ("base_model", "adapter")
    options, found = _sort(parse(MergeOptions, arguments, command="merge", positional=positional))
    for line in (*notes, *found):
        print_line(f"note: {line}", file=sys.stderr)
    for name in ("base_model", "adapter", "output"):
        if not getattr(options, name):
            raise ConfigError(
                f"--{name} is missing: rwkv-peft merge --base_model B --adapter DIR --output O"
            )

    if options.compare < 0 or (options.data_file and not options.compare):
        raise ConfigError("--compare is the number of tokens, above 0 where --data_file is given")

    from rwkv_peft.checkpoint.merge import merge

    report = merge(
        options.base_model,
        options.adapter.split(","),
        options.output,
        weights=options.weights or (),
        dtype=options.dtype,
        lora_alpha=options.lora_alpha,
        pissa_init=options.pissa_init,
        force=options.force,
        merge_base=options.merge_base,
        compare=options.compare,
        data_file=options.data_file,
        overwrite=bool(options.overwrite),
        check_files=bool(options.check_files),
    )
    for line in (f"wrote {options.output}", *report.lines()):
        print_line(line)
    return 0


def _sort(options: MergeOptions) -> tuple[MergeOptions, list[str]]:
    """The options with base and adapter in their places, and what is to be said of them.

    An adapter, a state or a run may stand where the base does; its base is known, or stands second.
    """
    first, second = options.base_model, options.adapter
    notes: list[str] = []
    kind = find_kind(first) if first else "other"
    if second and (kind == "model" or find_kind(second) != "model"):
        line = f"rwkv-peft merge {first or 'BASE'}"
        found = [find_added(part, "adapter", line) for part in second.split(",")]
        second = ",".join(path for path, _ in found)
        notes = [note for _, note in found if note]
        options = replace(options, adapter=second)
    if kind in ("model", "other"):
        require_no_log(first, "merge")
        if first and not second:
            refuse_model(first, f"rwkv-peft merge {first} ADAPTER --output O adds an adapter to it")
        return options, notes
    if kind in ("adapter", "state") and second and find_kind(second) == "model":
        return replace(options, base_model=second, adapter=find_whole(first)), notes
    parts = find_parts(first, "merge", wants_adapter=True)
    adapter = parts.adapter or parts.state
    if not adapter:
        raise ConfigError(f"{first} has no adapter: {parts.model} is a whole model already")
    if second and find_kind(second) == "model":
        return replace(options, base_model=second, adapter=adapter), [parts.note]
    if second:
        raise ConfigError(f"{first} is no model: rwkv-peft merge BASE {second} --output O")
    return replace(options, base_model=parts.model, adapter=adapter), [parts.note]
