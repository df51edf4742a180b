"""Models: the table of versions, and how one is recognised and built."""

import torch

from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.models import rwkv5, rwkv6, rwkv7
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig, Shapes, shape_of
from rwkv_peft.models.version import Version
from rwkv_peft.ops.dispatch import Request, select

# newest first: a file holds the first version that recognises it
VERSIONS: tuple[Version, ...] = (rwkv7.VERSION, rwkv6.VERSION, *rwkv5.VERSIONS)


def version_named(name: str) -> Version:
    """The record of a version by its name.

    Raises:
        ConfigError: there is none.
    """
    for version in VERSIONS:
        if version.name == name:
            return version
    raise ConfigError(f"RWKV {name} is not known: there are {_names()}")


def lr_factors() -> dict[str, float]:
    """Learning-rate factors of all versions, by the end of a tensor's name."""
    return {end: factor for version in VERSIONS for end, factor in version.lr_factors.items()}


def read_model_config(shapes: Shapes) -> ModelConfig:
    """The model config of a file's tensors.

    Raises:
        CheckpointError: the file holds no version of the table, a layer is missing, or a tensor
            that fixes the model config is missing or has the wrong number of dimensions or none of
            a size.
    """
    if "emb.weight" not in shapes or "head.weight" not in shapes:
        known = ", ".join(list(shapes)[:3]) or "nothing"
        raise CheckpointError(
            f"not an RWKV model: it has no emb.weight and head.weight (it holds {known} …); "
            "give an official .pth or .safetensors file"
        )
    version = next((v for v in VERSIONS if v.detect(shapes)), None)
    if version is None:
        raise CheckpointError(
            f"this file holds RWKV x040, and only {_names()} can be used: give a file of one of "
            "these, for example rwkv7-g1-0.1b or RWKV-x060-World-1B6"
        )
    n_layer = _count_layers(shapes)
    vocab_size, n_embd = shape_of(shapes, "emb.weight", 2)
    own = version.read(shapes)
    n_head = own.pop("n_head")
    dim_att = shape_of(shapes, "blocks.0.att.receptance.weight", 2)[0]
    if not n_head or dim_att % n_head:
        raise CheckpointError(f"damaged RWKV file: {n_head} heads do not divide {dim_att} channels")
    if empty := next((name for name, shape in shapes.items() if 0 in shape), None):
        raise CheckpointError(f"damaged RWKV file: {empty} has shape {shapes[empty]}")
    return ModelConfig(
        version=version.name,
        n_layer=n_layer,
        n_embd=n_embd,
        dim_att=dim_att,
        dim_ffn=shape_of(shapes, "blocks.0.ffn.key.weight", 2)[0],
        head_size=dim_att // n_head,
        vocab_size=vocab_size,
        **own,
    )


def _count_layers(shapes: Shapes) -> int:
    """The number of layers, all of which are there."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    # no longer than the names, whatever number one holds
    missing = next((i for i in range(len(layers)) if str(i) not in layers), None)
    if missing is not None:
        last = max(layers, key=lambda layer: (len(layer), layer))
        raise CheckpointError(
            f"damaged RWKV file: it holds {len(layers)} layers, of which one is {last}, and lacks "
            f"layer {missing}"
        )
    return len(layers)


def _names() -> str:
    return ", ".join(version.name for version in VERSIONS)


def build(
    model_config: ModelConfig,
    *,
    op: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RWKV:
    """A model without weights (on the meta device), with its operator's backend chosen.

    Args:
        op: 'auto' or a backend's name; `device` and `dtype` are what it must serve.
    Raises:
        BackendUnavailableError: no backend, or not the one asked for, can serve.
    """
    version = version_named(model_config.version)
    request = Request(torch.device(device), dtype, model_config.head_size)
    choice = select(version.operator, version.backends, op, request)
    with torch.device("meta"):
        return RWKV(model_config, version, choice)
