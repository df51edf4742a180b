from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rwkv_peft
from rwkv_peft.checkpoint.adapter import read_adapter, write_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.attach import PREFIX, Attachment, attach
from rwkv_peft.models.base import RWKV

TOKENS = torch.arange(1, 41).view(1, 40)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "scaled": {"r": 4, "lora_alpha": 32, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"att.key": 2}, "alpha_pattern": {"att.value": 1}},
    "own targets": {"r": 4, "target_modules": ["receptance", "head", "emb"]},
    "regex": {"r": 4, "target_modules": r".*blocks\.1\.att\.(key|output)"},
    "one layer": {"r": 4, "layers_to_transform": [1], "layers_pattern": "blocks"},
    "one layer by its number": {"r": 4, "layers_to_transform": [1]},
}


def adapted(path: Path, options: dict[str, Any]) -> tuple[RWKV, Attachment]:
    """A model whose adapter has been drawn at random, as if trained."""
    model = rwkv_peft.load_model(path)
    trained = attach(model, "lora", options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model, trained


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_changes_nothing_before_training(name: str, model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    before = model(TOKENS)[0]
    attach(model, "lora", VARIANTS[name])
    torch.testing.assert_close(model(TOKENS)[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_a_reloaded_and_a_merged_adapter_give_the_trained_logits(
    name: str, make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_file(dtype=torch.float32)
    model, trained = adapted(base, VARIANTS[name])
    expected = model(TOKENS)[0]
    assert (expected - rwkv_peft.load_model(base)(TOKENS)[0]).abs().max() > 1e-2
    write_adapter(tmp_path / "adapter", trained, trained, base=base)
    reloaded = rwkv_peft.load_model(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(reloaded(TOKENS)[0], expected, rtol=0, atol=1e-6)
    rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "merged.pth")
    merged = rwkv_peft.load_model(tmp_path / "merged.pth")
    torch.testing.assert_close(merged(TOKENS)[0], expected, rtol=0, atol=1e-4)


def test_merging_changes_only_the_adapted_tensors_and_keeps_order_and_types(
    model_file: Path, tmp_path: Path
) -> None:
    _, trained = adapted(model_file, {"r": 4, "target_modules": ["receptance"]})
    write_adapter(tmp_path / "adapter", trained, trained, base=model_file)
    rwkv_peft.merge(model_file, tmp_path / "adapter", tmp_path / "merged.pth")
    base, merged = read_weights(model_file), read_weights(tmp_path / "merged.pth")
    assert list(base) == list(merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"blocks.{i}.att.receptance.weight" for i in range(2)}
    assert all(base[name].dtype == merged[name].dtype for name in base)


def test_only_the_adapter_is_trained_and_all_of_it_receives_gradients(model_file: Path) -> None:
    model, trained = adapted(model_file, {"r": 4})
    # receptance, key, value and output of time mixing, key and value of channel mixing
    assert len(trained) == 2 * 6 * 2
    assert all("lora_" in name for name in trained)
    model(TOKENS)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def test_full_tuning_trains_every_tensor_that_the_forward_reads(
    make_model_file: Callable[..., Path],
) -> None:
    model = rwkv_peft.load_model(make_model_file(has_first_value_mix=True))
    trained = attach(model, "none", {})
    unread = {f"blocks.0.att.v{i}" for i in range(3)}
    assert set(trained) == {name for name, _ in model.named_parameters()} - unread
    model(TOKENS)[0].square().sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zz": 4}, r"no option 'zz'. Allowed: .*lora_alpha"),
        ({"lora_alfa": 4}, "has no option 'lora_alfa': did you mean 'lora_alpha'\\? Allowed: "),
        ({"rank": 4}, "has no option 'rank': did you mean 'r'\\? Allowed: "),
        ({"alpha": 4}, "did you mean 'lora_alpha'"),
        ({"dropout": 0.1}, "did you mean 'lora_dropout'"),
        ({"target_modules": ["receptanse"]}, "'receptanse' is not a module.*receptance"),
        ({"init_lora_weights": "eva"}, "'eva' needs a pass over data"),
        ({"r": 0}, "peft_config: .*positive"),
    ],
)
def test_an_impossible_option_is_named(
    options: dict[str, Any], message: str, model_file: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(rwkv_peft.load_model(model_file), "lora", options)


def test_adapter_files_have_the_names_other_programs_read(model_file: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import load_file

    _, trained = adapted(model_file, {"r": 4, "lora_alpha": 16})
    write_adapter(tmp_path / "adapter", trained, trained, base=model_file)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.att.receptance.lora_A.weight" in names
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha) == (4, 16)
    assert config.base_model_name_or_path == str(model_file)


def test_an_adapter_of_another_shape_is_refused(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_file()
    _, trained = adapted(base, {"r": 4})
    write_adapter(tmp_path / "adapter", trained, trained, base=base)
    other = make_model_file("other.pth", n_layer=3)
    with pytest.raises(CheckpointError, match=r"12 tensors differ, first blocks\.2"):
        rwkv_peft.load_model(other, adapter=tmp_path / "adapter", force=True)
    narrow = make_model_file("narrow.pth", n_embd=64, dim_att=64)
    with pytest.raises(CheckpointError, match="does not fit"):
        rwkv_peft.merge(narrow, tmp_path / "adapter", tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


def test_an_untrained_adapter_is_not_merged(model_file: Path, tmp_path: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    trained = attach(model, "lora", {"r": 4})
    write_adapter(tmp_path / "adapter", trained, trained, base=model_file)
    with pytest.raises(CheckpointError, match="changes nothing"):
        rwkv_peft.merge(model_file, tmp_path / "adapter", tmp_path / "merged.pth")


def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter: it has no adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"safetensors is a text file: copy the adapter's"):
        read_adapter(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOVEL"}')
    with pytest.raises(CheckpointError, match=r"cannot be used: its method novel: no such"):
        read_adapter(tmp_path)


def test_writing_an_adapter_twice_replaces_the_first(model_file: Path, tmp_path: Path) -> None:
    _, trained = adapted(model_file, {"r": 4})
    write_adapter(tmp_path / "adapter", trained, trained, base=model_file)
    moved = {name: value.detach() + 1 for name, value in trained.items()}
    write_adapter(tmp_path / "adapter", trained, moved, base=model_file)
    tensors = read_adapter(tmp_path / "adapter").tensors
    name = "blocks.0.att.receptance.lora_A.default.weight"
    assert torch.equal(tensors[PREFIX + name.replace(".default", "")], moved[name])
    assert [p.name for p in tmp_path.iterdir() if "adapter" in p.name] == ["adapter"]
