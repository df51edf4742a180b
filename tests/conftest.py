import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# read by the rwkv package when it is imported
os.environ["RWKV_V7_ON"] = "1"
os.environ["RWKV_JIT_ON"] = "0"

from rwkv_peft.checkpoint.pth import write_weights
from rwkv_peft.models.geometry import Geometry
from rwkv_peft.models.initial import initial_weights


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and PyTorch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def make_geometry(**changes: Any) -> Geometry:
    values = {
        "version": "x070",
        "n_layer": 2,
        "n_embd": 128,
        "dim_att": 128,
        "dim_ffn": 512,
        "head_size": 64,
        "vocab_size": 320,
        "ranks": {"w": 32, "a": 32, "v": 32, "g": 32},
        "has_first_value_mix": False,
    }
    return Geometry(**{**values, **changes})


@pytest.fixture
def make_model_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small RWKV-7 file whose every tensor is random, as trained ones are."""

    def make(
        name: str = "base.pth",
        *,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        **changes: Any,
    ) -> Path:
        geometry = make_geometry(**changes)
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for key, value in initial_weights(geometry, seed).items():
            scale = 0.05 if value.ndim == 2 else 0.1
            noise = torch.randn(value.shape, generator=generator) * scale
            weights[key] = (value + noise).to(dtype)
        write_weights(tmp_path / name, weights)
        return tmp_path / name

    return make


@pytest.fixture
def model_file(make_model_file: Callable[..., Path]) -> Path:
    return make_model_file()


@pytest.fixture
def make_data_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a jsonl file of documents, by default twelve of unequal lengths."""

    def make(texts: list[str] | None = None, name: str = "data.jsonl") -> Path:
        if texts is None:
            texts = [f"row {i}: " + "words and 字 " * (1 + i * i % 7) for i in range(12)]
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
        return tmp_path / name

    return make


@pytest.fixture
def data_file(make_data_file: Callable[..., Path]) -> Path:
    return make_data_file()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs a command line in this process and gives its code, output and errors."""
    from rwkv_peft.cli.main import main

    def run(*args: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(a) for a in args])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="session")
def official_logits() -> Callable[..., torch.Tensor]:
    """Logits (T, V) of the rwkv package for a file, all tokens at once."""

    def run(path: Path, tokens: list[int]) -> torch.Tensor:
        from rwkv.model import RWKV

        model = RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
        logits, _ = model.forward(tokens, None, full_output=True)
        assert isinstance(logits, torch.Tensor)
        return logits

    return run
