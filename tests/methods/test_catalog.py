"""Every method of peft's table on RWKV-5.2, 6 and 7."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import attach_saved, write_adapter
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.methods.catalog import method_config, method_names, resolve

TOKENS = torch.arange(1, 25).view(1, 24)
SIXTH: dict[str, Any] = {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448}
VERSIONS: dict[str, dict[str, Any]] = {
    "5.2": {"version": "x052", "ranks": {}, "dim_ffn": 448},
    "6": SIXTH,
    "7": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 100},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 64},
    "oft": {"oft_block_size": 8},
    "pissa": {"r": 4},
    "trainable_tokens": {"token_indices": [1, 2, 5]},
    "vblora": {"vector_length": 64, "num_vectors": 16, "r": 4},
}
# peft's own first values of these are not zero
NOT_NEUTRAL = ("c3a", "fourierft", "unilora", "vblora")
NAMES = [n for n in method_names() if n not in ("none", "state")]
CASES = {name: (name, OPTIONS.get(name, {})) for name in NAMES} | {
    "miss bat": ("miss", {"init_weights": "bat", "r": 32}),
    "miss mini": ("miss", {"init_weights": "mini", "r": 32, "mini_r": 8}),
}


def moved(trained: Attachment) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.values():
            p += torch.randn(p.shape, generator=generator) * 0.02


def assert_trains(model: torch.nn.Module, trained: Attachment) -> None:
    """All that is declared has a gradient, and nothing else."""
    model.train()(TOKENS)[0].square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in trained), key
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_method_is_neutral_trains_what_it_declares_reloads_and_merges(
    case: str,
    version: str,
    make_model_file: Callable[..., Path],
    decompose_otherwise: Callable[[], None],
    tmp_path: Path,
) -> None:
    name, options = CASES[case]
    base = make_model_file(dtype=torch.float32, n_layer=2, **VERSIONS[version])
    model = rwkv_peft.load_model(base)
    before = model(TOKENS)[0].detach()
    official = dict(model.named_parameters())
    torch.manual_seed(1)
    trained = attach(model, name, options)
    change = (model.eval()(TOKENS)[0] - before).abs().max()
    assert (change < 1e-4) != (name in NOT_NEUTRAL), change
    moved(trained)  # where factors begin at zero, so does the gradient of the others
    assert_trains(model, trained)
    assert not any(p is q for p in trained.values() for q in official.values())
    adapted = model.eval()(TOKENS)[0].detach()
    assert (adapted - before).abs().max() > 1e-4
    write_adapter(tmp_path / "adapter", trained, trained, base=base)
    torch.manual_seed(2)
    decompose_otherwise()  # as another machine may: files hold what was made of the base
    reloaded = rwkv_peft.load_model(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(reloaded(TOKENS)[0], adapted, rtol=0, atol=1e-4)
    again = rwkv_peft.load_model(base, op="reference")
    attachment, values = attach_saved(again, tmp_path / "adapter")
    assert_trains(again, attachment)
    torch.testing.assert_close(again.eval()(TOKENS)[0], adapted, rtol=0, atol=1e-4)
    assert all(torch.equal(values[key], trained[key]) for key in values)
    report = rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "merged.pth")
    merged = rwkv_peft.load_model(tmp_path / "merged.pth")
    torch.testing.assert_close(merged(TOKENS)[0], adapted, rtol=0, atol=1e-4)
    assert report.comparison is not None and report.comparison.max_difference < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", VERSIONS)
def test_merged_files_open_in_the_official_runtime_with_the_adapters_logits(
    version: str,
    make_model_file: Callable[..., Path],
    official_logits_of: Callable[..., list[torch.Tensor]],
    tmp_path: Path,
) -> None:
    base = make_model_file(dtype=torch.float32, **VERSIONS[version])
    wanted = {}
    for case, (name, options) in CASES.items():
        model = rwkv_peft.load_model(base)
        torch.manual_seed(1)
        trained = attach(model, name, options)
        moved(trained)
        wanted[case] = model.eval()(TOKENS)[0][0].detach()
        write_adapter(tmp_path / case, trained, trained, base=base)
        rwkv_peft.merge(base, tmp_path / case, tmp_path / f"{case}.pth", compare=0)
    official = official_logits_of(
        [tmp_path / f"{case}.pth" for case in wanted],
        TOKENS[0].tolist(),
        VERSIONS[version].get("version", "x070"),
    )
    for (name, logits), found in zip(wanted.items(), official, strict=True):
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("prefix_tuning", "teaches prompts to attention layers.*--peft state"),
        ("Prompt-Tuning", "teaches prompts"),
        ("lily", "cannot be merged"),
        ("lorra", "did you mean lora"),
        ("trainable_tokens", "leaves nothing to train"),
    ],
)
def test_a_method_that_cannot_serve_says_why(method: str, message: str, model_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(rwkv_peft.load_model(model_file), method, {})


def test_pissa_is_lora_with_an_initialisation() -> None:
    config: Any = method_config("PiSSA", {"r": 8, "svd_niter": 2}, "x070")
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 8, "pissa_niter_2")
    given = {"r": 8, "lora_alpha": 4, "init_lora_weights": "pissa"}
    assert resolve("pissa", given) == ("lora", given)
    assert resolve("LN-tuning", {}) == ("ln_tuning", {})


@pytest.mark.parametrize(
    ("method", "options"),
    [("bone", {}), ("disha", {}), ("miss", {"bone_r": 8}), ("miss", {"mode": "bat"})],
)
def test_older_names_are_known_on_the_command_line_alone(
    method: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"no such method|has no option"):
        method_config(method, options, "x070")


@pytest.mark.parametrize("parts", [["ln"], ["time"], ["emb", "head"]])
@pytest.mark.parametrize("version", VERSIONS)
def test_parts_of_the_model_are_trained_saved_and_merged_beside_an_adapter(
    version: str, parts: list[str], make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_file(dtype=torch.float32, **VERSIONS[version])
    model = rwkv_peft.load_model(base)
    torch.manual_seed(1)
    trained = attach(model, "lora", {"r": 4}, train_parts=parts)
    assert trained.plain and all(model.get_parameter(n) is trained[n] for n in trained.plain)
    moved(trained)
    adapted = model(TOKENS)[0].detach()
    write_adapter(tmp_path / "adapter", trained, trained, base=base)
    reloaded = rwkv_peft.load_model(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(reloaded(TOKENS)[0], adapted, rtol=0, atol=1e-4)
    rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "merged.pth")
    merged = rwkv_peft.load_model(tmp_path / "merged.pth")
    torch.testing.assert_close(merged(TOKENS)[0], adapted, rtol=0, atol=1e-4)


def test_a_part_that_is_in_no_name_is_an_error(model_file: Path) -> None:
    with pytest.raises(ConfigError, match="'tine' is in the name of no tensor"):
        attach(rwkv_peft.load_model(model_file), "lora", {}, train_parts=["tine"])
