"""What cannot be exported or opened is named in one line, and nothing is left of a try."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights, write_weights

Run = Callable[..., SimpleNamespace]


def refused(run: Run, *args: object) -> str:
    """The one line in which a command line is refused."""
    done = run(*args)
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    return str(done.err)


def with_tensors(source: Path, path: Path, **added: torch.Tensor) -> Path:
    weights = {name: x.clone() for name, x in read_weights(source).items()}
    torch.save(weights | added, path)
    return path


VARIANTS = {
    "RWKV-7a": {"blocks.0.ffn.s_emb.weight": torch.zeros(320, 1024)},
    "RWKV-7b": {
        "blocks.0.ffn.s_emb.weight": torch.zeros(320, 1024),
        "blocks.0.qkv.qq.weight": torch.zeros(256, 128),
    },
    "RWKV-8 with ROSA": {"blocks.1.rosa_qkv.emb": torch.zeros(1, 1, 128)},
    "INT8": {
        "blocks.0.att.key.weight": torch.zeros(128, 128, dtype=torch.int8),
        "blocks.0.att.key.weight_scale": torch.zeros(128, dtype=torch.float16),
    },
    "NVFP4": {
        "blocks.0.att.key.weight": torch.zeros(128, 64, dtype=torch.uint8),
        "blocks.0.att.key.weight.nf4_b_scale": torch.zeros(128, 8).to(torch.float8_e4m3fn),
        "blocks.0.att.key.weight.nvfp4_t_scale": torch.ones(()),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_known_files_that_cannot_be_used_are_called_by_their_names(
    cli: Run, model_file: Path, make_data_file: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path = with_tensors(model_file, tmp_path / "other.pth", **VARIANTS[name])
    output = tmp_path / "out.gguf"
    for command in (
        ("inspect", path),
        ("generate", "--load_model", path, "--prompt", "a"),
        ("train", path, make_data_file(), "--proj_dir", tmp_path / "run"),
        ("export", path, "--to", "gguf", "--output", output),
    ):
        assert name in refused(cli, *command)
    assert not output.exists() and not (tmp_path / "run").exists()


def test_what_a_format_does_not_hold_is_refused_before_anything_is_written(
    cli: Run, make_model_file: Callable[..., Path], model_file: Path, tmp_path: Path
) -> None:
    fifth = make_model_file("5.pth", version="x052", ranks={}, dim_ffn=448)
    for to in ("gguf", "hf", "hf-fla"):
        assert "this model is x052" in refused(
            cli,
            "export",
            fifth,
            "--to",
            to,
            "--output",
            tmp_path / f"o{'.gguf' * (to == 'gguf')}",
        )
    export = ("export", model_file, "--output")
    said = refused(cli, *export, tmp_path / "o.st", "--to", "st", "--dtype", "bf16")
    assert "--dtype bf16: --to st holds fp16" in said
    assert ".gguf" in refused(cli, *export, tmp_path / "o.pth", "--to", "gguf")
    assert "--to is missing" in refused(cli, "export", model_file)
    assert "is read" in refused(cli, *export, model_file, "--to", "pth", "--overwrite", "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5.pth", "base.pth"]


def test_a_file_that_is_there_and_a_foreign_modelfile_stay(
    cli: Run, model_file: Path, tmp_path: Path
) -> None:
    output, modelfile = tmp_path / "o.gguf", tmp_path / "Modelfile"
    modelfile.write_text("FROM somewhere\n")
    export = ("export", model_file, "--to", "gguf", "--output", output)
    assert "Modelfile" in refused(cli, *export)
    assert modelfile.read_text() == "FROM somewhere\n" and not output.exists()
    modelfile.unlink()
    assert cli(*export).code == 0
    assert "exists" in refused(cli, *export)
    # one of an earlier export is replaced
    assert cli(*export[:-1], tmp_path / "two.gguf").code == 0
    assert "FROM ./two.gguf" in modelfile.read_text()


def test_an_adapter_without_its_base_says_which_it_needs(
    cli: Run, model_file: Path, make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ("train", model_file, make_data_file(), "--proj_dir", run, "--epoch_count", "1")
    assert cli(*train, "--ctx_len", "32").code == 0
    model_file.rename(tmp_path / "moved.pth")
    export = ("export", run / "rwkv-0-adapter", "--to", "gguf", "--output", tmp_path / "o.gguf")
    said = refused(cli, *export)
    assert "base.pth" in said and "--base_model" in said
    assert cli(*export, "--base_model", tmp_path / "moved.pth").code == 0


def test_a_state_is_refused_where_no_program_reads_it(
    cli: Run, model_file: Path, tmp_path: Path
) -> None:
    plain = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}
    write_weights(tmp_path / "s.pth", plain)
    for to in ("gguf", "bin", "hf"):
        said = refused(cli, "export", tmp_path / "s.pth", "--to", to)
        assert "learned state" in said
    full = {
        f"blocks.{i}.{part}.ts_state": torch.randn(128) for i in range(2) for part in ("att", "ffn")
    }
    write_weights(tmp_path / "full.pth", plain | full)
    said = refused(cli, "export", tmp_path / "full.pth", "--to", "pth", "--output", "o.pth")
    assert "one time_state a layer" in said


@pytest.mark.parametrize("to", ["gguf", "bin", "hf", "hf-fla"])
def test_a_model_with_a_learned_state_is_not_written_without_it(
    cli: Run, model_file: Path, tmp_path: Path, to: str
) -> None:
    states = {f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)}
    path = with_tensors(model_file, tmp_path / "tuned.pth", **states)
    output = tmp_path / (f"out.{to}" if to in ("gguf", "bin") else "out")
    said = refused(cli, "export", path, "--to", to, "--output", output)
    assert f"holds a learned state, for which --to {to} has no place" in said
    assert "use --to st or pth" in said and not output.exists()


def test_a_damaged_folder_is_told_in_one_line(cli: Run, model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert cli("export", model_file, "--to", "hf", "--output", folder).code == 0
    config, weights = folder / "config.json", folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    assert "damaged" in refused(cli, "inspect", folder)
    weights.unlink()
    assert "neither" in refused(cli, "inspect", folder)
    index = '{"weight_map": {"emb.weight": "../../base.pth"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    assert "lacks" in refused(cli, "inspect", folder)
    config.write_text("[" * 100000)
    refused(cli, "inspect", folder)
