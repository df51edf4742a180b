"""`rwkv-peft init OUTPUT --n_layer 12 --n_embd 768`"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rwkv_peft.cli.parse import parse
from rwkv_peft.config import Switch
from rwkv_peft.errors import ConfigError
from rwkv_peft.printing import print_line


@dataclass(frozen=True, slots=True)
class InitOptions:
    """Shape of a new RWKV-7."""

    output: str = ""
    """The file to write, .pth or .safetensors."""
    overwrite: Switch = 0
    """1 replaces what has this name, if it is nothing that is read."""
    n_layer: int = 12
    """Layers."""
    n_embd: int = 768
    """Width, a multiple of the head size."""
    vocab_size: int = 65536
    """Vocabulary; a smaller one cuts the World vocabulary off at this id."""
    dim_ffn: int = 0
    """Width of channel mixing; four times n_embd if 0."""
    head_size_a: int = 64
    """Head size."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of the file."""
    random_seed: int = 0
    """Seed of the random tensors."""


def run(args: Sequence[str]) -> int:
    """Writes a model with the official initialisation."""
    options = parse(InitOptions, args, command="init", positional=("output",))
    if not options.output:
        raise ConfigError("no file given: rwkv-peft init model.pth --n_layer 12 --n_embd 768")
    sizes = ("n_layer", "n_embd", "vocab_size", "head_size_a")
    for name in sizes:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be above 0, got {getattr(options, name)}")
    if options.n_embd % options.head_size_a:
        raise ConfigError(
            f"--n_embd {options.n_embd} is not a multiple of the head size {options.head_size_a}"
        )

    from rwkv_peft.checkpoint.pth import write_weights
    from rwkv_peft.checkpoint.stream import require_ending
    from rwkv_peft.device import dtype_of
    from rwkv_peft.guard import require_free
    from rwkv_peft.models import VERSIONS
    from rwkv_peft.models.config import ModelConfig

    require_ending(options.output, "OUTPUT")
    require_free(options.output, overwrite=bool(options.overwrite), flag="OUTPUT")
    # the newest whose pre-training is known
    name, fresh = next((version.name, version.fresh) for version in VERSIONS if version.fresh)
    chosen = ModelConfig(
        version=name,
        n_layer=options.n_layer,
        n_embd=options.n_embd,
        dim_att=options.n_embd,
        dim_ffn=options.dim_ffn or 4 * options.n_embd,
        head_size=options.head_size_a,
        vocab_size=options.vocab_size,
    )
    model_config, weights = fresh(chosen, options.random_seed)
    dtype = dtype_of(options.precision)
    write_weights(options.output, {name: x.to(dtype) for name, x in weights.items()})
    count = sum(x.numel() for x in weights.values())
    print_line(f"wrote {options.output}: {model_config.describe()}, {count:,} weights")
    return 0
