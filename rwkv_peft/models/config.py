"""The shape of a model, as read from the names and shapes of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkv_peft.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that fixes the tensors of a model.

    Attributes:
        version: 'x050', 'x051', 'x052', 'x060' or 'x070', as in `--my_testing`.
        n_layer, n_embd, dim_att, dim_ffn, head_size, vocab_size: L, D, D, F, N, V.
        ranks: widths of the low-rank maps; of w, a, v and g in RWKV-7, of maa and decay in RWKV-6.
            The widths of released files follow no single formula, so they are only ever read or
            asked for.
        has_first_value_mix: RWKV-7 files may hold blocks.0.att.v0, v1 and v2, which nothing reads.
        has_time_first: RWKV-5 files may hold the logarithm time_first in place of time_faaaa.
    """

    version: str
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    vocab_size: int
    ranks: dict[str, int] = field(default_factory=dict)
    has_first_value_mix: bool = True
    has_time_first: bool = False

    @property
    def n_head(self) -> int:
        """H, the number of heads."""
        return self.dim_att // self.head_size

    def describe(self) -> str:
        """One line for a person, such as 'x070, 12 layers of 768, vocabulary 65536'."""
        return (
            f"{self.version}, {self.n_layer} layers of {self.n_embd}, vocabulary {self.vocab_size}"
        )


def detect_version(shapes: Shapes) -> str:
    """The version a file holds: 'x070', 'x060', 'x052', 'x051', 'x050', or 'x040' of older ones.

    Raises:
        CheckpointError: the names are not those of an RWKV model.
    """
    if "emb.weight" not in shapes or "head.weight" not in shapes:
        known = ", ".join(list(shapes)[:3]) or "nothing"
        raise CheckpointError(
            f"not an RWKV model: it has no emb.weight and head.weight (it holds {known} …); "
            "give an official .pth or .safetensors file"
        )
    first = {name.removeprefix("blocks.0.att."): s for name, s in shapes.items()}
    if "r_k" in first:
        return "x070"
    if "time_maa_x" in first:
        return "x060"
    if "time_decay" in first and "ln_x.weight" in first:
        if "gate.weight" not in first:
            return "x050"
        return "x052" if len(first["time_decay"]) == 2 and first["time_decay"][1] > 1 else "x051"
    return "x040"


def read_model_config(shapes: Shapes) -> ModelConfig:
    """The model config of a file's tensors.

    Raises:
        CheckpointError: the version is not supported, or a tensor that fixes the model config is
            missing or has the wrong number of dimensions.
    """
    version = detect_version(shapes)
    if version not in READERS:
        raise CheckpointError(
            f"this file holds RWKV {version}, and only {', '.join(READERS)} can be used: give a "
            "file of RWKV-5, 6 or 7, for example rwkv7-g1-0.1b or RWKV-x060-World-1B6"
        )
    look = _Lookup(shapes, version)
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    vocab_size, n_embd = look("emb.weight", 2)
    own = READERS[version](look)
    n_head = own.pop("n_head")
    dim_att = look("blocks.0.att.receptance.weight", 2)[0]
    if dim_att % n_head:
        raise CheckpointError(f"damaged RWKV file: {n_head} heads do not divide {dim_att} channels")
    return ModelConfig(
        version=version,
        n_layer=max(layers) + 1,
        n_embd=n_embd,
        dim_att=dim_att,
        dim_ffn=look("blocks.0.ffn.key.weight", 2)[0],
        head_size=dim_att // n_head,
        vocab_size=vocab_size,
        **own,
    )


class _Lookup:
    """Shapes by name, with an error that names what is missing."""

    def __init__(self, shapes: Shapes, version: str) -> None:
        self.shapes, self._version = shapes, version

    def __call__(self, name: str, ndim: int) -> tuple[int, ...]:
        found = self.shapes.get(name)
        if found is None or len(found) != ndim:
            what = "is missing" if found is None else f"has shape {found}"
            raise CheckpointError(
                f"damaged RWKV {self._version} file: {name} {what}, {ndim} dimensions needed"
            )
        return found


def _read_rwkv7(look: _Lookup) -> dict[str, Any]:
    # block 0 may have no value mix, and the narrowest model has no other block
    value_mix = "blocks.1.att.v1" if "blocks.1.att.v1" in look.shapes else "blocks.0.att.v1"
    has_value_mix = value_mix in look.shapes
    return {
        "n_head": look("blocks.0.att.r_k", 2)[0],
        "ranks": {
            "w": look("blocks.0.att.w1", 2)[1],
            "a": look("blocks.0.att.a1", 2)[1],
            "v": look(value_mix, 2)[1] if has_value_mix else 0,
            "g": look("blocks.0.att.g1", 2)[1],
        },
        "has_first_value_mix": "blocks.0.att.v0" in look.shapes,
    }


def _read_rwkv6(look: _Lookup) -> dict[str, Any]:
    return {
        "n_head": look("blocks.0.att.time_faaaa", 2)[0],
        "ranks": {
            "maa": look("blocks.0.att.time_maa_w2", 3)[1],
            "decay": look("blocks.0.att.time_decay_w1", 2)[1],
        },
    }


def _read_rwkv5(look: _Lookup) -> dict[str, Any]:
    has_time_first = "blocks.0.att.time_first" in look.shapes
    decay = look.shapes["blocks.0.att.time_decay"]
    return {"n_head": decay[0], "has_time_first": has_time_first}


# version -> what it reads besides the sizes that all share
READERS: dict[str, Callable[[_Lookup], dict[str, Any]]] = {
    "x070": _read_rwkv7,
    "x060": _read_rwkv6,
    "x052": _read_rwkv5,
    "x051": _read_rwkv5,
    "x050": _read_rwkv5,
}


# flags of the model config on the command line, and the field that each must agree with
FLAGS = {
    "n_layer": "n_layer",
    "n_embd": "n_embd",
    "vocab_size": "vocab_size",
    "dim_att": "dim_att",
    "dim_ffn": "dim_ffn",
    "head_size_a": "head_size",
    "my_testing": "version",
}


def check_flags(
    model_config: ModelConfig, flags: Mapping[str, int | str | None], file: str
) -> None:
    """Compares what a user said of a model with what its file says; 0, "" and None say nothing.

    Raises:
        ConfigError: they differ; the message has both values.
    """
    for flag, name in FLAGS.items():
        said, found = flags.get(flag), getattr(model_config, name)
        if said and said != found:
            raise ConfigError(
                f"--{flag} {said} contradicts {file}, where it is {found}: leave the flag out "
                "(it is read from the file) or give another file"
            )
