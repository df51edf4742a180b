"""`rwkv-peft merge --base_model B --adapter DIR --output O`"""

from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_peft.cli.parse import parse
from rwkv_peft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Files of a merge."""

    base_model: str = ""
    """The official weights that the adapter was trained on."""
    adapter: str = ""
    """Folder of the adapter in peft's format."""
    output: str = ""
    """The file to write, .pth or .safetensors."""


def run(args: Sequence[str]) -> int:
    """Merges an adapter into a copy of its base."""
    options = parse(MergeOptions, args, command="merge")
    for name in ("base_model", "adapter", "output"):
        if not getattr(options, name):
            raise ConfigError(
                f"--{name} is missing: rwkv-peft merge --base_model B --adapter DIR --output O"
            )

    from rwkv_peft.checkpoint.adapter import merge

    merge(options.base_model, options.adapter, options.output)
    print(f"wrote {options.output}")
    return 0
