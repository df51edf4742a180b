"""`rwkv-peft convert FILE --base_model B --output O`"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rwkv_peft.cli.given import find_kind, find_parts, find_whole, refuse_model
from rwkv_peft.cli.options import AdapterOptions
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import Switch
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_line


@dataclass(frozen=True, slots=True)
class ConvertOptions(AdapterOptions):
    """What to bring into which form."""

    source: str = ""
    """A folder in peft's format, or an adapter or state file of any RWKV-PEFT."""
    base_model: str = ""
    """The official weights that it was trained on."""
    output: str = ""
    """The folder or file to write."""
    overwrite: Switch = 0
    """1 replaces what has this name, if it is nothing that is read."""
    to: Literal["peft", "pth", "residual"] = "peft"
    """peft: a folder in peft's format. pth: a file of lora_A and lora_B, from LoRA and MiSS.

    residual, for PiSSA: a folder of the base that it was trained on, the adapter on that base, and
    the init_pissa.pth that leads back.
    """
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Dtype of the residual's changed matrices; that of the base if keep."""


def run(args: Sequence[str]) -> int:
    """Writes an adapter or a state in another form."""
    options = parse(ConvertOptions, args, command="convert", positional=("source",))
    options = replace(options, source=find_whole(options.source))
    if options.source and not (options.base_model and find_kind(options.source) != "run"):
        parts = find_parts(options.source, "convert", wants_adapter=True)
        base, source = options.base_model or parts.model, parts.adapter or parts.state
        if not source:
            refuse_model(parts.model, "rwkv-peft export writes it for other programs")
        options = replace(options, base_model=base, source=source)
        print_line(f"note: {parts.note}", file=sys.stderr)
    for name in ("source", "base_model", "output"):
        if not getattr(options, name):
            raise ConfigError(
                f"--{name} is missing: rwkv-peft convert FILE --base_model model.pth --output O"
            )

    from rwkv_peft.checkpoint.convert import convert

    line = convert(
        options.source,
        options.output,
        options.base_model,
        to=options.to,
        lora_alpha=options.lora_alpha,
        pissa_init=options.pissa_init,
        dtype=options.dtype,
        force=options.force,
        overwrite=bool(options.overwrite),
    )
    print_line(line)
    return 0
