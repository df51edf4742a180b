"""The table of formats, by their names for `--to`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.records import map_pth
from rwkv_peft.checkpoint.stream import Spec, map_safetensors, round_to, write_file
from rwkv_peft.data.templates import Template
from rwkv_peft.device import dtype_of
from rwkv_peft.exports import gguf, hf, rwkvcpp, st
from rwkv_peft.exports.source import Source
from rwkv_peft.exports.stored import Stored, all_mapped


@dataclass(frozen=True, slots=True)
class Job:
    """What is written.

    Attributes:
        dtype: one of the format's.
        name: of the model, for people.
    """

    source: Source
    dtype: str
    template: Template
    name: str

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each official tensor, for formats that can keep them."""
        if self.dtype == "keep":
            return dict(self.source.dtypes)
        return dict.fromkeys(self.source.dtypes, dtype_of(self.dtype))


@dataclass(frozen=True, slots=True)
class Format:
    """A format of other programs.

    Attributes:
        ending: of its files; empty if it is a folder.
        programs: that open it.
        dtypes: that it can hold, the default first.
        versions: of RWKV that these programs open in it.
        write: writes an open file, or fills a folder.
        read: the official tensors of such a file or folder.
        owned: names in a folder that exports write.
        has_template: whether it tells how turns are written.
    """

    ending: str
    programs: str
    dtypes: tuple[str, ...]
    versions: tuple[str, ...]
    write: Callable[[Any, Job], None]
    read: Callable[[Path], dict[str, Stored]]
    owned: tuple[str, ...] = ()
    has_template: bool = False


def _write_gguf(file: IO[bytes], job: Job) -> None:
    source = job.source
    gguf.write(file, source.tensors, source.model_config, job.dtype, job.name, job.template)


def _write_bin(file: IO[bytes], job: Job) -> None:
    rwkvcpp.write(file, job.source.tensors, job.source.model_config, job.dtype)


def _write_st(file: IO[bytes], job: Job) -> None:
    source = job.source
    tensors = st.layout_of(source.model_config).to_foreign(source.tensors)
    states = st.state_to_foreign(source.states)
    write_stored(file, {**tensors, **states}, dict.fromkeys([*tensors, *states], st.DTYPE))


def _write_pth(file: IO[bytes], job: Job) -> None:
    source = job.source
    tensors = {**source.tensors, **all_mapped(source.states)}
    dtypes = job.dtypes() | dict.fromkeys(source.states, torch.float32)
    write_stored(file, tensors, dtypes, is_safetensors=False)


def _write_folder(folder: Path, job: Job, *, is_fla: bool) -> None:
    source = job.source
    dtypes = job.dtypes()
    hf.write(folder, source.tensors, source.model_config, dtypes, job.template, is_fla=is_fla)


def _read_pth(path: Path) -> dict[str, Stored]:
    return all_mapped(dict(map_pth(path)))


def _read_st(path: Path) -> dict[str, Stored]:
    return st.to_official(map_safetensors(path))


def write_stored(
    file: IO[bytes],
    tensors: Mapping[str, Stored],
    dtypes: Mapping[str, torch.dtype],
    *,
    is_safetensors: bool = True,
) -> None:
    """Writes tensors in these dtypes, one at a time, as a `.pth` or a safetensors file.

    Raises:
        CheckpointError: a value does not fit its dtype, or is not finite.
    """
    specs = {n: Spec(x.shape, dtypes[n]) for n, x in tensors.items()}

    def pieces(name: str) -> Iterator[Tensor]:
        return (round_to(name, x, dtypes[name]) for x in tensors[name].pieces())

    write_file(file, specs, pieces, is_safetensors=is_safetensors)


_FLOATS = ("keep", "bf16", "fp16", "fp32")
_ALL = ("x070", "x060", "x052", "x051", "x050")
FORMATS: dict[str, Format] = {
    "gguf": Format(
        ".gguf",
        "llama.cpp, Ollama, LM Studio and koboldcpp",
        ("fp16", *(name for name in gguf.TYPES if name != "fp16")),
        ("x070", "x060"),
        _write_gguf,
        lambda path: gguf.read(path)[0],
        has_template=True,
    ),
    "st": Format(".st", "Ai00 and web-rwkv", ("fp16",), _ALL[:4], _write_st, _read_st),
    "bin": Format(".bin", "rwkv.cpp", ("fp16", "fp32"), _ALL[:3], _write_bin, rwkvcpp.read),
    "hf": Format(
        "",
        "transformers, in its native layout",
        _FLOATS,
        ("x070",),
        partial(_write_folder, is_fla=False),
        hf.read,
        hf.FILES,
        has_template=True,
    ),
    "hf-fla": Format(
        "",
        "flash-linear-attention and transformers",
        _FLOATS,
        ("x070",),
        partial(_write_folder, is_fla=True),
        hf.read,
        hf.FILES,
        has_template=True,
    ),
    "pth": Format(".pth", "rwkv, RWKV-Runner and ChatRWKV", _FLOATS, _ALL, _write_pth, _read_pth),
}
