"""Folders of adapters, and adapter files of older versions, damaged by chance."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import load_adapter, read_adapter, write_adapter
from rwkv_peft.checkpoint.folder import CONFIG, NOTE, WEIGHTS
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.methods import limits
from rwkv_peft.methods.attach import attach
from tests.fuzz.damage import FULL, QUICK, run, spoil, spoil_value, to_json

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "rank_pattern": {"key": 4}, "alpha_pattern": {"key": 4}},
    "miss": {"r": 4},
    "vera": {"r": 4},
}
HINTS = LegacyAdapterHints(lora_alpha=8.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A small base, and a folder of each method."""
    from tests.conftest import make_model_config

    folder = tmp_path_factory.mktemp("adapters")
    from rwkv_peft.checkpoint.pth import write_weights
    from rwkv_peft.models.initial import initial_weights

    config = make_model_config(n_layer=1, n_embd=64, dim_att=64, dim_ffn=128, vocab_size=64)
    base = folder / "base.pth"
    write_weights(base, {n: x.float() for n, x in initial_weights(config, 0).items()})
    found = []
    for method, options in METHODS.items():
        model = rwkv_peft.load_model(base)
        attachment = attach(model, method, options)
        with torch.no_grad():
            for x in attachment.values():
                x += 0.01
        write_adapter(folder / method, attachment, attachment, base=base)
        found.append(folder / method)
    return base, found


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)


def damage(folder: Path, rng: random.Random) -> None:
    """Changes one file of an adapter, mostly as values."""
    name = rng.choice([CONFIG, CONFIG, CONFIG, NOTE, WEIGHTS])
    raw = (folder / name).read_bytes()
    if name == WEIGHTS or rng.random() < 0.2:
        raw = spoil(raw, rng, at_least=1)
    else:
        raw = to_json(spoil_value(json.loads(raw), rng))
    (folder / name).write_bytes(raw)


def check(seeds: range, adapters: tuple[Path, list[Path]], folder: Path) -> set[str]:
    base, made = adapters
    results = set()
    for seed in seeds:
        rng = random.Random(seed)
        copy = folder / "adapter"
        shutil.copytree(rng.choice(made), copy)
        damage(copy, rng)
        model = rwkv_peft.load_model(base, op="reference")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.add(run(lambda m=model, f=copy: load_adapter(m, read_adapter(f), f)))  # type: ignore[misc]
        except BaseException as error:
            error.add_note(f"seed {seed}") if hasattr(error, "add_note") else None
            raise
        finally:
            shutil.rmtree(copy)
    return results


def test_a_damaged_adapter_is_refused_in_one_line_or_loaded(
    adapters: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    assert check(range(QUICK), adapters, tmp_path) == {"read", "refused"}


@pytest.mark.slow
def test_thousands_of_damaged_adapters(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    assert check(range(10_000, 10_000 + FULL), adapters, tmp_path) == {"read", "refused"}


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**7},
        {"r": 10**12},
        {"r": 10**30},
        {"rank_pattern": {"key": 10**9}},
        {"target_modules": "((.*)*)*x$"},
        {"exclude_modules": "(.*.*)*="},
        {"rank_pattern": {"((.*)*)*x": 4}},
        {"alpha_pattern": {"((.*)*)*x": 4}},
        {"modules_to_save": ["((.*)*)*x"]},
        {"layers_pattern": ["((.*)*)*x"], "layers_to_transform": [0]},
        {"peft_type": "XLORA"},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": ["LORA"]},
        {"init_lora_weights": "pissa_niter_99999999"},
        {"lora_alpha": 10**400},
        {"target_modules": ["key"] * 2 + [f"m{i}" for i in range(20_000)]},
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_it_gets_it(
    change: dict[str, Any], adapters: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (lora, *_) = adapters
    shutil.copytree(lora, tmp_path / "a")
    saved = json.loads((lora / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_bytes(to_json({**saved, **change}))
    model = rwkv_peft.load_model(base, op="reference")
    folder = tmp_path / "a"
    assert run(lambda: load_adapter(model, read_adapter(folder), folder)) == "refused"


def make_old(rng: random.Random) -> dict[str, torch.Tensor]:
    modules = ["blocks.0.att.key", "blocks.0.ffn.key"]
    if rng.random() < 0.5:
        return {f"{m}.disha": torch.full((4, 64), 0.1) for m in modules}
    shapes = {"lora_A": (2, 64), "lora_B": (64, 2)}
    return {
        f"{m}.{leaf}": torch.full(shape, 0.1) for m in modules for leaf, shape in shapes.items()
    }


def spoil_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, Any]:
    name = rng.choice(list(tensors))
    x = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: {k: v for k, v in tensors.items() if k != name},
        lambda: {**tensors, name: x[:0]},
        lambda: {**tensors, name: x[0]},
        lambda: {**tensors, name: x * float("nan")},
        lambda: {**tensors, name: x.to(rng.choice([torch.int64, torch.bool, torch.complex64]))},
        lambda: {**tensors, name: x[None, None]},
        lambda: {**tensors, name: torch.zeros(())},
        lambda: {**tensors, name.replace("blocks", rng.choice(["x", "", "blocks.\x1b", "."])): x},
        lambda: {**tensors, "blocks.9999999.att.key.lora_A": x},
        lambda: {**tensors, "lora_A": x, ".disha": x},
        lambda: dict(tensors),
    ]
    found: dict[str, Any] = rng.choice(changes)()
    return found


def check_old(seeds: range, folder: Path) -> set[str]:
    results = set()
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / f"{seed}.pth"
        torch.save(spoil_tensors(make_old(rng), rng), path)
        if rng.random() < 0.3:
            path.write_bytes(spoil(path.read_bytes(), rng, at_least=1))
        hints = rng.choice([HINTS, LegacyAdapterHints()])
        results.add(run(lambda p=path, h=hints: read_adapter(p, h)))  # type: ignore[misc]
        path.unlink()
    return results


def test_a_damaged_file_of_an_old_adapter_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    assert check_old(range(QUICK), tmp_path) == {"read", "refused"}


@pytest.mark.slow
def test_thousands_of_damaged_old_adapters(tmp_path: Path) -> None:
    assert check_old(range(10_000, 10_000 + FULL), tmp_path) == {"read", "refused"}
