"""Weight files written tensor by tensor."""

import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.checkpoint.stream import Spec, write_tensors
from rwkv_peft.errors import CheckpointError


def test_pieces_of_a_tensor_must_be_what_was_announced(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(4, 3)
    write_tensors(tmp_path / "x.pth", {"x": Spec((4, 3), x.dtype)}, lambda _: x.split(1))
    assert torch.equal(read_weights(tmp_path / "x.pth")["x"], x)
    with pytest.raises(CheckpointError, match="x has 9 elements"):
        write_tensors(tmp_path / "x.pth", {"x": Spec((4, 3), x.dtype)}, lambda _: x[1:].split(1))
    with pytest.raises(CheckpointError, match="announced as"):
        write_tensors(tmp_path / "x.pth", {"x": Spec((4, 3), x.dtype)}, lambda _: x.t())
    write_weights(tmp_path / "empty.pth", {"none": torch.zeros(0, 3), "one": torch.tensor(1.0)})
    assert read_weights(tmp_path / "empty.pth")["none"].shape == (0, 3)


def test_any_program_can_check_the_zip_and_map_its_aligned_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    weights = {f"x{n}": torch.arange(n).to(torch.bfloat16) for n in range(1, 9)}
    write_weights(path, weights)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = torch.load(path, mmap=True, weights_only=True)
    assert list(found) == list(weights)
    for name, x in found.items():
        assert torch.equal(x, weights[name]) and x.data_ptr() % 64 == 0
