"""A merge is compared with the layers as they were trained, not as they are attached again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint import adapter as adapters
from rwkv_peft.checkpoint import trial
from rwkv_peft.checkpoint.adapter import write_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.checkpoint.trial import try_cycle
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.training.run import train

TOKENS = torch.arange(1, 25).view(1, 24)
# those that alter the base, draw at random or decompose it at the start, and the common ones
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kasa": ("lora", {"r": 4, "kasa_config": {}}),
    "pissa": ("pissa", {"r": 4}),
    "olora": ("lora", {"r": 4, "init_lora_weights": "olora"}),
    "orthogonal": ("lora", {"r": 4, "init_lora_weights": "orthogonal"}),
    "osf": ("osf", {}),
    "frod": ("frod", {}),
    "psoft": ("psoft", {}),
    "adamss": ("adamss", {}),
    "vera": ("vera", {}),
    "randlora": ("randlora", {}),
    "delora": ("delora", {}),
    "lora": ("lora", {"r": 4}),
    "dora": ("lora", {"r": 4, "use_dora": True}),
    "miss": ("miss", {"r": 8}),
    "bat": ("miss", {"r": 8, "init_weights": "bat"}),
    "oft": ("oft", {"oft_block_size": 8}),
    "embedding": ("lora", {"r": 4, "target_modules": ["emb", "head"]}),
    "parameter": ("lora", {"r": 4, "target_parameters": ["att.key.weight"]}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
Broken = Callable[[Any, Attachment], None]


def alter_base(model: Any, attachment: Attachment) -> None:
    """As if attaching took something else out of the base than it did in training."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            noise = torch.randn(module.weight.shape, generator=generator)
            noise *= 0.01 * module.weight.float().std()
            module.weight.data = module.weight.data + noise.to(module.weight)


def trained(
    base: Path, method: str, options: dict[str, Any], dtype: str
) -> tuple[RWKV, Attachment]:
    model = rwkv_peft.load_model(base, dtype=dtype)
    torch.manual_seed(1)
    attachment = attach(model, method, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return model, attachment


def break_attaching(monkeypatch: pytest.MonkeyPatch, how: Broken) -> None:
    whole = adapters.attach_config

    def attach_wrongly(model: Any, config: Any, **given: Any) -> Attachment:
        attachment = whole(model, config, **given)
        how(model, attachment)
        return attachment

    monkeypatch.setattr(adapters, "attach_config", attach_wrongly)


@pytest.mark.parametrize("case", METHODS)
def test_an_error_that_attaching_makes_again_is_found(
    case: str, make_model_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = make_model_file(dtype=torch.float32), tmp_path / "adapter"
    model, attachment = trained(base, *METHODS[case], "float32")
    write_adapter(folder, attachment, attachment, base=base)
    report = rwkv_peft.merge(base, folder, tmp_path / "right.pth", dtype="fp32", compare=0)
    assert report.as_trained == len(report.changed) and report.as_trained_error < 1e-5
    wanted = model.eval()(TOKENS)[0].detach()
    right = rwkv_peft.load_model(tmp_path / "right.pth")
    torch.testing.assert_close(right(TOKENS)[0], wanted, rtol=0, atol=2e-4)

    if case == "frod":
        return  # it computes without the base
    break_attaching(monkeypatch, alter_base)
    with pytest.raises(CheckpointError, match="from what its layer computed"):
        rwkv_peft.merge(base, folder, tmp_path / "wrong.pth", dtype="fp32", compare=0)
    assert not (tmp_path / "wrong.pth").exists()
    if case == "kasa":
        # the comparison with the adapter model, which shares the error, cannot find it
        given = {"dtype": "fp32", "force": True, "compare": 8}
        report = rwkv_peft.merge(base, folder, tmp_path / "wrong.pth", **given)
        assert report.comparison is not None and report.comparison.max_difference < 1e-4
        wrong = rwkv_peft.load_model(tmp_path / "wrong.pth")(TOKENS)[0]
        assert (wrong - wanted).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("method", ["vera", "randlora"])
def test_what_is_drawn_again_otherwise_is_found(
    method: str, model_file: Path, tmp_path: Path
) -> None:
    _, attachment = trained(model_file, method, {"save_projection": False}, "float32")
    write_adapter(tmp_path / "adapter", attachment, attachment, base=model_file)
    config = tmp_path / "adapter" / "adapter_config.json"
    rwkv_peft.merge(model_file, tmp_path / "adapter", tmp_path / "right.pth", compare=0)
    # of the generator that draws the projection
    config.write_text(json.dumps({**json.loads(config.read_text()), "projection_prng_key": 1}))
    with pytest.raises(CheckpointError, match="from what its layer computed"):
        rwkv_peft.merge(model_file, tmp_path / "adapter", tmp_path / "wrong.pth", compare=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_training_in_bf16_is_told_from_an_error(
    stored: torch.dtype,
    make_model_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base is rounded by the run, or by a method that alters it; both are no error."""
    base = make_model_file(dtype=stored)
    for case in ("kasa", "pissa", "olora", "frod", "lora", "dora", "bat", "embedding"):
        _, attachment = trained(base, *METHODS[case], "bfloat16")
        write_adapter(tmp_path / case, attachment, attachment, base=base)
        report = rwkv_peft.merge(base, tmp_path / case, tmp_path / f"{case}.pth", compare=0)
        alters = case in ("kasa", "pissa", "olora")
        # FRoD puts factors in the place of the base
        is_rounded = alters or (stored == torch.float32 and case != "frod")
        assert (report.as_trained_error > 1e-5) == is_rounded, case
        assert report.as_trained_error < 2**-7, case
    # what has not altered the base must fit to float32 rounding, in bf16 too
    if stored == torch.bfloat16:
        break_attaching(monkeypatch, lambda model, _: _scale(model, 1 + 1e-3))
        with pytest.raises(CheckpointError, match="from what its layer computed"):
            rwkv_peft.merge(base, tmp_path / "lora", tmp_path / "wrong.pth", compare=0)


def _scale(model: Any, factor: float) -> None:
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            layer.weight.data = layer.weight.data.float() * factor


def test_the_note_holds_products_with_the_merged_weight(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Its numbers are those of W + s B A, by products of float64."""
    base = make_model_file(dtype=torch.float32)
    _, attachment = trained(base, "lora", {"r": 4, "lora_alpha": 12}, "float32")
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    note = json.loads((tmp_path / "adapter" / "rwkv_peft.json").read_text())["trained"]
    assert note["dtype"] == "float32" and len(note["outputs"]) == 12
    import numpy as np

    for name, weight in read_weights(base).items():
        if name not in note["outputs"]:
            continue
        path = name.removesuffix(".weight")
        a, b = (attachment[f"{path}.lora_{x}.default.weight"].double() for x in "AB")
        u, x = (
            2.0 * np.random.RandomState(seed).randint(0, 2, (count, 4)) - 1
            for seed, count in enumerate(weight.shape)
        )
        merged = (weight.double() + 3 * b @ a).detach().numpy()
        wanted = [u[:, k] @ merged @ x[:, k] for k in range(4)]
        assert note["outputs"][name] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        plain = [u[:, k] @ weight.double().numpy() @ x[:, k] for k in range(4)]
        assert note["base"][name] == pytest.approx(plain, rel=1e-4, abs=1e-4)


def test_older_adapters_and_damaged_notes(
    cli: Callable[..., SimpleNamespace], model_file: Path, tmp_path: Path
) -> None:
    _, attachment = trained(model_file, "lora", {"r": 4}, "float32")
    write_adapter(tmp_path / "adapter", attachment, attachment, base=model_file)
    note = tmp_path / "adapter" / "rwkv_peft.json"
    whole = json.loads(note.read_text())
    files = ("--base_model", model_file, "--adapter", tmp_path / "adapter")
    said = cli("merge", *files, "--output", tmp_path / "one.pth").out
    assert "; 12 merged tensors are what their layers computed as they were trained, to " in said
    note.write_text(json.dumps({"base": whole["base"]}))
    said = cli("merge", *files, "--output", tmp_path / "two.pth").out
    assert "likeliest token is the same" in said
    assert "what the layers computed as they were trained is not known" in said
    for trained_note in ([], {"outputs": {"a": [1]}}, {"dtype": "x"}, {"outputs": 3}):
        note.write_text(json.dumps({**whole, "trained": trained_note}))
        done = cli("merge", *files, "--output", tmp_path / "three.pth")
        assert done.code == 2 and f"{note.parent} is damaged ({note.name}: " in done.err, (
            trained_note
        )
        assert not (tmp_path / "three.pth").exists()


def test_a_run_compares_what_it_merges_with_its_own_layers(
    model_file: Path,
    make_data_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig(
        load_model=str(model_file),
        data_file=str(make_data_file(["one text", "another"])),
        proj_dir=str(tmp_path / "out"),
        peft_config={"r": 4, "kasa_config": {}},
        lr_init=1e-2,
        accelerator="cpu",
    )
    whole = adapters.attach_config

    # in the trial too, which compares the wrong adapter with itself
    def attach_wrongly(model: Any, config: Any, **given: Any) -> Attachment:
        attachment = whole(model, config, **given)
        if isinstance(model, RWKV):
            alter_base(model, attachment)
        return attachment

    monkeypatch.setattr(adapters, "attach_config", attach_wrongly)
    with pytest.raises(CheckpointError, match="from what its layer computed"):
        train(config)
    assert (tmp_path / "out" / "rwkv-0-adapter").is_dir()
    assert not (tmp_path / "out" / "rwkv-0.pth").exists()


def test_the_trial_finds_a_base_that_attaching_alters_in_place(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two models must not share the weights, or both are altered alike."""
    whole = adapters.attach_config

    def attach_wrongly(model: Any, config: Any, **given: Any) -> Attachment:
        attachment = whole(model, config, **given)
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                module.weight.data += 0.1 * torch.randn_like(module.weight)
        return attachment

    model = rwkv_peft.load_model(model_file)
    attachment = attach(model, "lora", {"r": 4})
    monkeypatch.setattr(adapters, "attach_config", attach_wrongly)
    monkeypatch.setattr(trial, "attach_config", attach_wrongly)
    with pytest.raises(ConfigError, match="other outputs after reading"):
        try_cycle(model, attachment)
