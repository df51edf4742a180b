"""Adapter folders that an interrupted run left behind."""

from pathlib import Path

import torch

from rwkv_peft.checkpoint.folder import SavedAdapter, read_folder, write_folder


def write(folder: Path, value: float) -> None:
    from peft import LoraConfig

    write_folder(folder, SavedAdapter(LoraConfig(r=1), {"x": torch.tensor([value])}, {}), "base")


def test_what_a_killed_run_left_beside_the_folder_does_not_block(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for name in (".adapter.old", ".adapter.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("left")
    write(folder, 1)
    write(folder, 2)
    assert read_folder(folder).tensors["x"].item() == 2
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "rwkv_peft.json",
    ]


def test_reading_gives_back_a_folder_whose_replacing_was_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write(folder, 1)
    folder.rename(tmp_path / f".adapter.{'0' * 16}.old")
    assert read_folder(folder).tensors["x"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
