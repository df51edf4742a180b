"""Bases in the layouts of other programs, opened under official names."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rwkv_peft.exports import hf, st
from rwkv_peft.exports.stored import all_mapped

# ends of the names of safetensors files
SAFETENSORS_ENDINGS = (".safetensors", *st.ENDINGS)


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder that holds a model, see `open_folder`."""
    return path.is_dir() and hf.is_folder(path)


def open_folder(path: Path) -> dict[str, Tensor]:
    """The official tensors of a Hugging Face folder, mapped.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are in another form.
    """
    return {name: x.whole() for name, x in hf.read(path).items()}


def to_official(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file under official names, whichever program wrote it.

    Raises:
        CheckpointError: a tensor has no place in the layout.
    """
    if st.is_layout(tensors, path):
        return {name: x.whole() for name, x in st.to_official(tensors).items()}
    if (layout := hf.find_layout(tensors)) is None:
        return dict(tensors)
    found = hf.sort_official(layout.to_official(all_mapped(tensors), 0, path))
    return {name: x.whole() for name, x in found.items()}
