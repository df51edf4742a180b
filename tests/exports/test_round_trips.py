"""From a .pth into each format and back, and each format as a base."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.cli.main import main
from rwkv_peft.exports.formats import FORMATS

RWKV6 = {"version": "x060", "dim_ffn": 448, "ranks": {"maa": 32, "decay": 64}}
RWKV5 = {"version": "x052", "dim_ffn": 448, "ranks": {}}
MODELS = {"x070": {"n_layer": 3, "has_first_value_mix": True}, "x060": RWKV6, "x052": RWKV5}
MODELS |= {version: RWKV5 | {"version": version} for version in ("x051", "x050")}
FP32 = ("--dtype", "fp32")
# what the format holds all numbers of: the dtype of the file, and what is asked for
EXACT = {
    "gguf": [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")],
    "st": [(torch.float16, "fp16")],
    "bin": [(torch.float32, "fp32"), (torch.float16, "fp16")],
    "hf": [(torch.bfloat16, "keep"), (torch.float32, "keep"), (torch.float16, "keep")],
    "hf-fla": [(torch.bfloat16, "keep"), (torch.float32, "keep"), (torch.float16, "keep")],
    "pth": [(torch.bfloat16, "keep"), (torch.float32, "keep"), (torch.float16, "keep")],
}
# what is asked for by name is what "keep" keeps; float32 holds the others
NAMED = {
    torch.bfloat16: ("bf16", "fp32"),
    torch.float16: ("fp16", "fp32"),
    torch.float32: ("fp32",),
}
EXACT |= {
    to: kinds + [(stored, name) for stored, names in NAMED.items() for name in names]
    for to, kinds in EXACT.items()
    if kinds[0][1] == "keep"
}
CASES = [
    (to, version, stored, dtype)
    for to, kinds in EXACT.items()
    for stored, dtype in kinds
    for version in MODELS
    # repeated for the channels of a head, numbers of 5.1 come back in another shape
    if version in FORMATS[to].versions and (to, version) != ("st", "x051")
]


def export(source: Path, to: str, output: Path, *flags: str) -> Path:
    assert main(["export", str(source), "--to", to, "--output", str(output), *flags]) == 0
    return output


@pytest.mark.parametrize(("to", "version", "stored", "dtype"), CASES)
def test_a_model_comes_back_with_its_bits(
    make_model_file: Callable[..., Path],
    tmp_path: Path,
    to: str,
    version: str,
    stored: torch.dtype,
    dtype: str,
) -> None:
    source = make_model_file(dtype=stored, **MODELS[version])
    output = export(source, to, tmp_path / f"out{FORMATS[to].ending}", "--dtype", dtype)
    wanted, found = read_weights(source), FORMATS[to].read(output)
    # nothing reads these, and some formats have no place for them
    lost = {f"blocks.0.att.v{n}" for n in "012"} if to not in ("st", "pth") else set()
    assert wanted.keys() - lost == found.keys()
    for name, x in found.items():
        y = wanted[name]
        if to == "bin" and version == "x052" and name.endswith("time_decay"):
            # the format holds exp(-exp(x)) instead
            assert torch.allclose(x.whole().float(), y.float(), atol=1e-3)
        else:
            assert torch.equal(x.whole().to(y.dtype), y), name
        assert x.shape == y.shape


@pytest.mark.parametrize("to", ["st", "hf", "hf-fla"])
def test_a_pth_made_of_an_export_is_the_pth_it_came_from(
    make_model_file: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    source = make_model_file(dtype=torch.float16, n_layer=3)
    output = export(source, to, tmp_path / f"out{FORMATS[to].ending}")
    export(output, "pth", tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("to", ["st", "hf", "hf-fla"])
def test_every_command_takes_such_a_base(
    make_model_file: Callable[..., Path],
    make_data_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    to: str,
) -> None:
    official = make_model_file(dtype=torch.float16)
    base = export(official, to, tmp_path / f"base{FORMATS[to].ending}")
    data, run = make_data_file(), tmp_path / "run"
    train = ["train", str(base), str(data), "--proj_dir", str(run), "--epoch_count", "1"]
    assert main([*train, "--ctx_len", "32", "--lr_init", "1e-3", "--precision", "fp32"]) == 0
    merge = ["merge", "--base_model", str(base), "--adapter", str(run / "rwkv-0-adapter")]
    assert main([*merge, "--output", str(tmp_path / "merged.pth")]) == 0
    assert read_weights(tmp_path / "merged.pth").keys() == read_weights(official).keys()
    generate = ["generate", "--prompt", "hi", "--max_tokens", "3", "--temperature", "0"]
    capsys.readouterr()
    texts = []
    for model in (base, official):
        assert main([*generate, "--load_model", str(model)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["inspect", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "x070"
    # a run on the official file is one on the same base
    assert main([*merge[:2], str(official), *merge[3:], "--output", str(tmp_path / "two.pth")]) == 0


def test_an_adapter_is_merged_on_its_way(
    make_model_file: Callable[..., Path], make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    base, run = make_model_file(), tmp_path / "run"
    train = ["train", str(base), str(make_data_file()), "--proj_dir", str(run)]
    assert main([*train, "--epoch_count", "1", "--ctx_len", "32", "--lr_init", "1e-2"]) == 0
    alone = export(run / "rwkv-0-adapter", "pth", tmp_path / "one.pth")
    merged, found = read_weights(run / "rwkv-0.pth"), read_weights(alone)
    assert all(torch.equal(found[name], x) for name, x in merged.items())
    # a run stands for its last epoch
    export(run, "pth", tmp_path / "two.pth")
    assert (tmp_path / "two.pth").read_bytes() == (run / "rwkv-0.pth").read_bytes()


def test_an_export_of_a_run_has_what_its_merged_file_lost_by_rounding(
    make_model_file: Callable[..., Path],
    make_data_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_model_file()
    line = ["train", str(base), str(make_data_file()), "--proj_dir", "run", "--epoch_count", "1"]
    assert main([*line, "--ctx_len", "32", "--lr_init", "1e-5"]) == 0
    # what was learned is smaller than a step of bf16
    wanted = read_weights(export(tmp_path / "run/rwkv-0-adapter", "pth", tmp_path / "a.pth", *FP32))
    merged = read_weights("run/rwkv-0.pth")
    assert any((x - merged[name].float()).abs().max() > 0 for name, x in wanted.items())
    capsys.readouterr()
    assert main(["export", "run", "--to", "pth", *FP32]) == 0
    assert f"run/rwkv-0-adapter, on its base {base}" in capsys.readouterr().err
    # named as what it is, a whole model
    found = read_weights("run-rwkv-0-fp32.pth")
    assert all(torch.equal(found[name], x) for name, x in wanted.items())
    # without the base the merged file is what there is
    base.rename("moved.pth")
    assert main(["export", "run", "--to", "pth", *FP32, "--overwrite", "1"]) == 0
    found = read_weights("run-rwkv-0-fp32.pth")
    assert all(torch.equal(found[name], x.float()) for name, x in merged.items())


def test_large_models_are_split_into_shards_that_are_read_together(
    make_model_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_peft.exports.hf.LARGEST_SHARD", 200_000)
    source = make_model_file(n_layer=3)
    folder = export(source, "hf", tmp_path / "folder")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    found, wanted = read_weights(folder), read_weights(source)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


def test_a_value_that_fp16_cannot_hold_is_refused_and_nothing_is_left(
    make_model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model_file()
    weights = {name: x.clone() for name, x in read_weights(source).items()}
    weights["blocks.1.ffn.key.weight"][3, 5] = 70000
    write_weights(source, weights)
    for to in ("gguf", "st", "bin"):
        output = tmp_path / "new" / f"out{FORMATS[to].ending}"
        assert main(["export", str(source), "--to", to, "--output", str(output)]) == 2
        assert "does not fit into fp16" in capsys.readouterr().err
        assert list((tmp_path / "new").iterdir()) == []
