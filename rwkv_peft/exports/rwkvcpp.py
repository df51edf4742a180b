"""`.bin` of rwkv.cpp.

Source of the format: rwkv.cpp, `docs/FILE_FORMAT.md` and `python/convert_pytorch_to_ggml.py`.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from rwkv_peft.checkpoint.stream import as_bytes, is_finite, round_to
from rwkv_peft.errors import CheckpointError
from rwkv_peft.exports.layout import TRANSPOSED, VECTOR, Form, Layout, Rule, rule
from rwkv_peft.exports.stored import Stored, mapped
from rwkv_peft.methods.merge import row_slices
from rwkv_peft.models.config import ModelConfig

MAGIC, FORMAT = 0x67676D66, 101
_HEADER, _TENSOR = struct.Struct("<iiiiii"), struct.Struct("<iii")
_TYPES = {0: torch.float32, 1: torch.float16}
# parts of the names of tensors that stay float32
_FLOAT32 = (".time_", ".k_k", ".k_a", ".r_k", ".x_rwkvag", ".x_k", ".w0", ".a0", ".v0")

_COLUMN = Form(lambda xs, i: xs[0].unsqueeze(-1), lambda x, i, n: (x.squeeze(-1),))
_JOINED = Form(lambda xs, i: torch.cat(list(xs)), lambda x, i, n: x.split(1))


def _block(name: str, form: Form, foreign: str = "") -> Rule:
    return rule(f"blocks.{{i}}.{name}", f"blocks.{{i}}.{foreign or name}", form)


_RWKV7 = Layout(
    (
        *(_block(f"att.{x}{n}", TRANSPOSED) for x in "wavg" for n in "12"),
        Rule(
            tuple(f"blocks.{{i}}.att.x_{x}" for x in "rwkvag"),
            "blocks.{i}.att.x_rwkvag",
            _JOINED,
        ),
    ),
    # it ends at tensors that it does not read
    unread=frozenset(f"blocks.0.att.v{n}" for n in "012"),
)


def _rwkv6(n_head: int) -> Layout:
    decay = Form(lambda xs, i: xs[0].reshape(n_head, -1, 1), lambda x, i, n: (x.view(1, 1, -1),))
    return Layout(
        (
            *(_block(f"att.time_maa_{x}", VECTOR) for x in "xwkvrg"),
            *(_block(f"ffn.time_maa_{x}", VECTOR) for x in "kr"),
            _block("att.time_faaaa", _COLUMN),
            _block("att.time_decay", decay),
            *(_block(f"att.time_{x}_w{n}", TRANSPOSED) for x in ("maa", "decay") for n in "12"),
        )
    )


def _rwkv5() -> Layout:
    # the decay itself, and not the logarithm of its negative logarithm
    decay = Form(
        lambda xs, i: xs[0].float().exp().neg().exp().unsqueeze(-1),
        lambda x, i, n: (x.log().neg().log().squeeze(-1),),
    )
    return Layout(
        (
            *(_block(f"att.time_mix_{x}", VECTOR) for x in "kvrg"),
            *(_block(f"ffn.time_mix_{x}", VECTOR) for x in "kr"),
            _block("att.time_faaaa", _COLUMN),
            _block("att.time_decay", decay),
        )
    )


def layout_of(version: str, n_head: int) -> Layout:
    """The layout of a version."""
    if version == "x070":
        return _RWKV7
    return _rwkv6(n_head) if version == "x060" else _rwkv5()


def write(
    file: IO[bytes], official: Mapping[str, Stored], model_config: ModelConfig, dtype: str
) -> None:
    """Writes a model, its tensors one at a time.

    Args:
        dtype: of the matrices, 'fp16' or 'fp32'; all else is float32.
    Raises:
        CheckpointError: a value does not fit fp16, or is not finite.
    """
    tensors = layout_of(model_config.version, model_config.n_head).to_foreign(official)
    sizes = (model_config.vocab_size, model_config.n_embd, model_config.n_layer)
    file.write(_HEADER.pack(MAGIC, FORMAT, *sizes, int(dtype == "fp16")))
    for name, stored in tensors.items():
        is_small = len(stored.shape) < 2 or any(part in name for part in _FLOAT32)
        kind = int(dtype == "fp16" and not is_small)
        encoded = name.encode()
        file.write(_TENSOR.pack(len(stored.shape), len(encoded), kind))
        file.write(struct.pack(f"<{len(stored.shape)}i", *reversed(stored.shape)) + encoded)
        for piece in stored.pieces():
            value = round_to(name, piece, _TYPES[kind])
            if not is_finite(value):
                raise CheckpointError(f"{name} holds NaN or infinity: nothing was written")
            file.write(as_bytes(value))


def read(path: str | Path) -> dict[str, Stored]:
    """The official tensors of a file, mapped.

    Raises:
        CheckpointError: it is another file, or quantised.
    """
    content = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    magic, number, *_ = _HEADER.unpack(content[: _HEADER.size].numpy().tobytes())
    if (magic, number) != (MAGIC, FORMAT):
        raise CheckpointError(f"{path} is no file of rwkv.cpp of the version {FORMAT}")
    found: dict[str, Stored] = {}
    place = _HEADER.size
    while place < len(content):
        place, name, found[name] = _read_tensor(path, content, place)
    version, n_head = "x052", 0
    if "blocks.0.att.x_rwkvag" in found:
        version = "x070"
    elif "blocks.0.att.time_maa_x" in found:
        version, n_head = "x060", found["blocks.0.att.time_faaaa"].shape[0]
    return layout_of(version, n_head).to_official(found, 0, path)


def _read_tensor(path: str | Path, content: Tensor, place: int) -> tuple[int, str, Stored]:
    ndim, length, kind = _TENSOR.unpack(content[place : place + _TENSOR.size].numpy().tobytes())
    if kind not in _TYPES:
        raise CheckpointError(f"{path} is quantised: export it as fp16 or fp32")
    place += _TENSOR.size
    sizes = struct.unpack(f"<{ndim}i", content[place : place + 4 * ndim].numpy().tobytes())
    place += 4 * ndim
    name = content[place : place + length].numpy().tobytes().decode()
    place += length
    shape, dtype = tuple(reversed(sizes)), _TYPES[kind]
    raw = content[place : place + torch.Size(shape).numel() * dtype.itemsize]

    def pieces() -> Iterator[Tensor]:
        # PyTorch views only aligned bytes as another dtype, and names have any length
        rows = raw.view(shape[0], -1)
        return (
            rows[part].clone().flatten().view(dtype).view(-1, *shape[1:])
            for part in row_slices(shape)
        )

    if place % dtype.itemsize:
        return place + len(raw), name, Stored(shape, dtype, pieces)
    return place + len(raw), name, mapped(raw.view(dtype).view(shape))
