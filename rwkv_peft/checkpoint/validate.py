"""What a file of weights may hold, whatever it is used for: all of it is looked at before use."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.errors import CheckpointError

LISTED_PROBLEMS = 12
# dtypes of weights
ALLOWED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# of a tensor's name, its characters and how many there are
_NAME = re.compile(r"[\w.\-/:+]{1,200}", re.ASCII)
# of its layer, which is less than 10,000
_LAYER = re.compile(r"(?:model\.)?blocks\.(?P<layer>0|[1-9]\d{0,3})\..+")


def validate_weights(loaded: Mapping[Any, Any], path: object, size: int) -> dict[str, Tensor]:
    """The tensors of a loaded file, each a plain one that lies in the file as it is.

    Args:
        path: for messages.
        size: of the file in bytes.
    Raises:
        CheckpointError: with all that is wrong. Tensors are dense, on the host and of a dtype of
            `ALLOWED`; none has more elements than are stored; names are those of weights.
    """
    strange = [
        ascii(name)[:80] for name, x in loaded.items() if type(x) not in (Tensor, nn.Parameter)
    ]
    if strange:
        raise CheckpointError(
            f"{path} holds other things than tensors ({', '.join(strange[:3])} …): "
            "give a file of weights alone"
        )
    problems = [p for name, x in loaded.items() for p in _find_problems(name, x)]
    asked = 0 if problems else sum(_count_bytes(x) for x in loaded.values())
    # weights that are tied are counted twice
    if asked > 2 * size:
        problems = [f"its tensors ask for {asked:,} bytes, and it has {size:,}"]
    if problems:
        raise CheckpointError(
            f"{path} cannot be used: {join_problems(problems)}: give a file of float weights, as "
            "RWKV programs write them"
        )
    return {name: x.detach() for name, x in loaded.items()}


def join_problems(problems: Iterable[str]) -> str:
    """Some problems in one line, and how many more there are."""
    found = list(problems)
    rest = len(found) - LISTED_PROBLEMS
    return "; ".join(found[:LISTED_PROBLEMS]) + f" and {rest} more" * (rest > 0)


def _find_problems(name: Any, x: Tensor) -> Iterator[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"{str(name)[:80]!r} is no name of a tensor"
        return
    if name.removeprefix("model.").startswith("blocks.") and not _LAYER.fullmatch(name):
        yield f"{name[:80]} is of no layer"
    if x.is_nested or x.layout != torch.strided or x.is_quantized or x.is_neg() or x.is_conj():
        kinds = {"nested": x.is_nested, "quantised": x.is_quantized, "sparse": x.layout}
        kind = next((k for k, is_so in kinds.items() if is_so and is_so != torch.strided), "lazy")
        yield f"{name} is {kind}"
    elif x.device.type != "cpu":
        yield f"{name} has no values (device {x.device.type})"
    elif x.dtype not in ALLOWED:
        yield f"{name} is {str(x.dtype).removeprefix('torch.')}"
    elif _count_bytes(x) > x.untyped_storage().nbytes():
        stored = x.untyped_storage().nbytes()
        yield f"{name} {tuple(x.shape)} asks for {_count_bytes(x):,} bytes, {stored:,} are stored"


def _count_bytes(x: Tensor) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
