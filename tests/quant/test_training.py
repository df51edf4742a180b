"""Runs on a base in 8 or 4 bits: what they learn, save, merge and refuse."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights, write_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.device import fp8_objection
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.exports.source import open_source
from rwkv_peft.methods.attach import attach
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.quant import STORAGES, Storage
from rwkv_peft.quant.linear import QuantisedLinear
from rwkv_peft.training import choose_device
from rwkv_peft.training.memory import weigh_base
from rwkv_peft.training.run import train
from tests.quant.test_linear import IN_RUNS, oracle
from tests.training.test_resume import assert_same, run_in_parts

METHODS: dict[str, dict[str, Any]] = {"lora": {"r": 4}, "miss": {"r": 8}, "state": {}}
TOKENS = torch.arange(1, 49).view(2, 24)


@pytest.fixture
def config(model_file: Path, data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "run"),
        peft="lora",
        peft_config=METHODS["lora"],
        quant="nf4",
        dataload="pad",
        epoch_count=2,
        micro_bsz=4,
        ctx_len=48,
        lr_init=1e-2,
        precision="fp32",
        accelerator="cpu",
        random_seed=0,
        data_cache=str(tmp_path / "cache"),
    )


def by_oracle(w: Tensor, quant: str) -> Tensor:
    """A float32 weight as bitsandbytes stores and gives it; int8 by its definition."""
    if quant == "int8":
        scale = w.abs().amax(1, keepdim=True) / 127
        return (w / scale).round() * scale
    return oracle(w, quant)


def is_stored(name: str, x: Tensor) -> bool:
    wide = name.startswith("blocks.") and name.endswith(".weight") and x.ndim == 2
    return wide


def write_rounded(base: Path, output: Path, quant: str) -> Path:
    """A float32 file of the weights that a stored base stands for."""
    weights = {n: x.float() for n, x in read_weights(base).items()}
    write_weights(
        output, {n: by_oracle(x, quant) if is_stored(n, x) else x for n, x in weights.items()}
    )
    return output


def losses(folder: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (folder / "loss_data.jsonl").read_text().splitlines()]


def logits(model: RWKV) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(TOKENS)[0]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quant", IN_RUNS)
def test_a_run_on_a_stored_base_is_one_on_the_weights_that_it_stands_for(
    quant: Any, method: str, config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, peft=method, peft_config=METHODS[method], quant=quant)
    train(config)
    rounded = write_rounded(Path(config.load_model), tmp_path / "rounded.pth", quant)
    dense = replace(config, load_model=str(rounded), proj_dir=str(tmp_path / "dense"), quant="none")
    train(dense)
    assert losses(tmp_path / "run") == losses(tmp_path / "dense")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
@pytest.mark.parametrize("quant", IN_RUNS)
def test_a_merged_file_is_the_base_as_trained_with_the_adapter(
    quant: Any, version: str, config: TrainConfig, make_model_file: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    ranks = {"ranks": {"maa": 32, "decay": 64}} if version == "x060" else {}
    base = make_model_file("other.pth", version=version, dtype=torch.float32, **ranks)
    options = {"r": 4, "target_modules": ["receptance"]}
    config = replace(config, load_model=str(base), peft_config=options, quant=quant)
    train(config)
    adapter, merged = tmp_path / "run/rwkv-1-adapter", tmp_path / "run/rwkv-1.pth"
    note = json.loads((adapter / "rwkv_peft.json").read_text())
    assert note["quant"] == {"storage": quant, "dtype": "float32", "head": False}
    rounded = write_rounded(base, tmp_path / "rounded.pth", quant)
    plain = tmp_path / "plain-adapter"
    shutil.copytree(adapter, plain)
    (plain / "rwkv_peft.json").unlink()
    wanted = logits(rwkv_peft.load_model(rounded, adapter=plain))
    assert torch.equal(logits(rwkv_peft.load_model(base, adapter=adapter)), wanted)
    torch.testing.assert_close(logits(rwkv_peft.load_model(merged)), wanted, rtol=0, atol=1e-4)
    here, there = read_weights(merged), read_weights(rounded)
    for name, x in here.items():
        assert torch.equal(x, there[name]) != name.endswith("receptance.weight"), name

    report = rwkv_peft.merge(base, adapter, tmp_path / "again.pth")
    assert report.as_trained == len(report.changed) > 0 and report.as_trained_error < 1e-5
    assert report.comparison is not None and not report.comparison.is_far
    assert (report.quant, report.merge_base) == (quant, "trained")
    off = sum((x - y).square().sum() for x, y in zip(read_weights(base).values(), there.values(),
                                                    strict=True))  # fmt: skip
    norm = sum(x.square().sum() for n, x in read_weights(base).items() if is_stored(n, x))
    assert report.quant_error == pytest.approx(float((off / norm) ** 0.5), rel=1e-3)


def test_a_merge_into_the_original_adds_the_same_to_other_weights(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    base, adapter = Path(config.load_model), tmp_path / "run/rwkv-1-adapter"
    report = rwkv_peft.merge(
        base, adapter, tmp_path / "original.pth", merge_base="original", dtype="fp32"
    )
    assert report.merge_base == "original" and report.as_trained == 0
    assert "--merge_base original" in report.lines()[0]
    rwkv_peft.merge(base, adapter, tmp_path / "trained.pth", dtype="fp32")
    rounded = read_weights(write_rounded(base, tmp_path / "rounded.pth", "nf4"))
    one, other = (read_weights(tmp_path / f"{x}.pth") for x in ("original", "trained"))
    for name, x in read_weights(base).items():
        found, wanted = one[name] - x.float(), other[name] - rounded[name]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert bool(found.any()) == is_stored(name, x), name


def test_adapters_of_bases_that_were_stored_otherwise_are_not_merged_together(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(config, merge=0))
    train(replace(config, merge=0, quant="none", proj_dir=str(tmp_path / "dense")))
    folders = [tmp_path / x / "rwkv-1-adapter" for x in ("run", "dense")]
    with pytest.raises(ConfigError, match="base stored in several ways"):
        rwkv_peft.merge(config.load_model, folders, tmp_path / "o.pth")
    note = folders[0] / "rwkv_peft.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "quant": {"storage": "nf5"}}))
    with pytest.raises(CheckpointError, match="known are int8, nf4, fp4"):
        rwkv_peft.merge(config.load_model, folders[0], tmp_path / "o.pth")
    assert not (tmp_path / "o.pth").exists()


def test_a_stopped_run_goes_on_and_only_with_its_own_storage(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, precision="bf16", save_every_steps=1)
    train(replace(config, proj_dir=str(tmp_path / "whole")))
    run_in_parts(config, tmp_path, 3)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ConfigError, match="quant is int8 and was nf4"):
        train(replace(config, resume="auto", quant="int8", proj_dir=str(tmp_path / "parts")))


def test_a_stored_part_cannot_be_trained_beside_an_adapter(config: TrainConfig) -> None:
    options = {"r": 4, "target_modules": ["att.receptance"]}
    with pytest.raises(ConfigError, match=r"--train_parts names blocks.0.ffn.key.weight"):
        train(replace(config, train_parts=["ffn.key"], peft_config=options))
    train(replace(config, train_parts=["ln"], peft_config=options, epoch_count=1))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_dropout": 0.1}])
def test_other_kinds_of_lora_learn_and_merge(
    options: dict[str, Any], config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(config, precision="bf16", peft_config={"r": 4, **options}))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    adapter = tmp_path / "run/rwkv-1-adapter"
    report = rwkv_peft.merge(config.load_model, adapter, tmp_path / "o.pth", dtype="fp32")
    assert report.as_trained > 0 and report.comparison is not None
    assert not report.comparison.is_far
    # and is trained further
    train(replace(config, load_adapter=str(adapter), peft="auto", peft_config={},
                  proj_dir=str(tmp_path / "on")))  # fmt: skip


WAYS: dict[str, dict[str, Any]] = {
    "packed": {"dataload": "pack"},
    "chunks": {"train_type": "infctx", "chunk_ctx": 16, "bptt_chunks": "all"},
    "recomputed": {"grad_cp": 1},
}


@pytest.mark.parametrize("method", ["lora", "dora", "state"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_may_come_in_any_way(
    way: str, method: str, config: TrainConfig, tmp_path: Path
) -> None:
    options = {"lora": {"r": 4}, "dora": {"r": 4, "use_dora": True}, "state": {}}[method]
    if (way, method) == ("packed", "state"):
        pytest.skip("the first document of a row alone begins with its state")
    base = tmp_path / "exact.pth"
    write_weights(base, {n: x.float() for n, x in read_weights(config.load_model).items()})
    config = replace(
        config, load_model=str(base), peft="state" if method == "state" else "lora",
        peft_config=options, epoch_count=1, **WAYS[way],
    )  # fmt: skip
    train(config)
    rounded = write_rounded(base, tmp_path / "rounded.pth", "nf4")
    train(replace(config, load_model=str(rounded), proj_dir=str(tmp_path / "dense"), quant="none"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "dense"), rel=1e-6)


def test_a_tune_that_goes_on_with_other_weights_says_so(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for method, name in (("lora", "rwkv-0-adapter"), ("state", "rwkv-0.pth")):
        begun = replace(config, peft=method, peft_config=METHODS[method], epoch_count=1,
                        proj_dir=str(tmp_path / method), merge=0)  # fmt: skip
        train(begun)
        saved = tmp_path / method / name
        for quant, is_other in (("int8", True), ("nf4", False)):
            capsys.readouterr()
            train(replace(begun, load_adapter=str(saved), peft_config={}, quant=quant,
                          proj_dir=str(tmp_path / f"{method}-{quant}")))  # fmt: skip
            line = f"{saved} was trained with --quant nf4, and goes on with {quant}"
            assert (line in capsys.readouterr().err) == is_other


def stored_model(path: Path, quant: str, dtype: torch.dtype = torch.float32) -> RWKV:
    weights = read_weights(path)
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights, dtype=dtype, storage=Storage(quant, dtype))
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("way", ["recomputed", "compiled"])
@pytest.mark.parametrize("method", ["lora", "miss"])
def test_recomputed_and_compiled_blocks_give_the_same_gradients(
    method: str, way: str, model_file: Path
) -> None:
    found = []
    for is_changed in (False, True):
        model = stored_model(model_file, "nf4")
        torch.manual_seed(0)
        trained = attach(model, method, METHODS[method])
        generator = torch.Generator().manual_seed(1)
        for p in trained.values():
            p.data += torch.randn(p.shape, generator=generator) / 20
        model.train()
        model.grad_cp = is_changed and way == "recomputed"
        if is_changed and way == "compiled":
            compile_blocks(model, backend="aot_eager")
        model.hidden(TOKENS)[0].square().mean().backward()
        found.append([p.grad for p in trained.values()])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("quant", STORAGES)
def test_the_guess_of_memory_counts_stored_bytes(quant: str, model_file: Path) -> None:
    model = stored_model(model_file, quant, torch.bfloat16)
    assert type(model.head) is not QuantisedLinear
    layers = [x for x in model.modules() if isinstance(x, QuantisedLinear)]
    assert len(layers) == 6 * model.model_config.n_layer
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    numbers = sum(x.numel() for x in read_weights(model_file).values())
    largest = max(x.out_features * x.in_features for x in layers)
    guess = weigh_base(model.model_config, numbers, 2, quant)
    # fp8 is multiplied as it is
    assert guess == held + (0 if quant == "fp8" else largest * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("quant", IN_RUNS)
def test_a_base_that_is_not_finite_or_not_in_fp16_is_refused(
    quant: Any, value: float, config: TrainConfig, tmp_path: Path
) -> None:
    weights = read_weights(config.load_model)
    weights["blocks.1.ffn.key.weight"] = weights["blocks.1.ffn.key.weight"].clone()
    weights["blocks.1.ffn.key.weight"][5, 7] = value
    torch.save(weights, tmp_path / "broken.pth")
    broken = replace(config, load_model=str(tmp_path / "broken.pth"), quant=quant, precision="fp16")
    what = "too large for" if value == 1e6 else "NaN or infinity in"
    with pytest.raises(CheckpointError, match=rf"{what}.*|blocks.1.ffn.key.weight.*{what}"):
        train(broken)


def test_an_export_has_the_base_as_it_was_trained(config: TrainConfig, tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["receptance"]}
    train(replace(config, peft_config=options))
    merged = {n: x.float() for n, x in read_weights(tmp_path / "run/rwkv-1.pth").items()}
    adapter = tmp_path / "run/rwkv-1-adapter"
    source = open_source(adapter, config.load_model, LegacyAdapterHints(), force=False)
    assert source.tensors.keys() == merged.keys()
    for name, x in source.tensors.items():
        found = torch.cat([piece.float() for piece in x.pieces()])
        # the merged file is rounded to bf16, the dtype of the base's file
        assert torch.equal(found.bfloat16().float(), merged[name]), name


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"precision": "fp32"}, "--quant fp8 gives bf16, and --precision is fp32"),
        ({"precision": "bf16"}, "a card that multiplies FP8, and cpu has not: use int8"),
    ],
)
def test_fp8_is_refused_where_it_cannot_be(
    given: dict[str, Any], what: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cpu" in what:
        monkeypatch.setattr(choose_device, "fp8_objection", fp8_objection)
    with pytest.raises(ConfigError, match=re.escape(what)):
        train(replace(config, quant="fp8", **given))
