import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# read by the rwkv package when it is imported
os.environ["RWKV_V7_ON"] = "1"
os.environ["RWKV_JIT_ON"] = "0"
# messages are compared in English, whatever the language of who runs the tests
os.environ["LC_MESSAGES"] = "en"
if os.environ.get("LC_ALL", "").startswith("zh"):
    del os.environ["LC_ALL"]

# processes that test side by side, and those that they start, would be in each other's way
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from rwkv_peft.checkpoint.pth import write_weights
from rwkv_peft.models import build
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.initial import initial_weights


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and PyTorch finds none")
    for item in items:
        # a keyword would be the name of a folder too
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _draws_are_the_same() -> None:
    """Whatever ran before; a test that wants other numbers says so."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run says what it is doing where that lasts, which depends on what else the machine does."""
    monkeypatch.setattr("rwkv_peft.training.display.PATIENCE", 3600.0)


def make_model_config(**changes: Any) -> ModelConfig:
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
    return ModelConfig(**{**values, **changes})


def older_weights(model_config: ModelConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors of RWKV-5 or 6 in the range of trained ones."""
    vectors = ("time_mix", "time_maa", "time_fa", "time_first")
    weights = {}
    for name, parameter in build(model_config, op="reference").named_parameters():
        shape, leaf = parameter.shape, name.split(".")[-1]
        uniform = torch.rand(shape, generator=generator)
        if leaf == "time_decay":
            weights[name] = uniform * 7 - 6
        elif leaf.startswith(vectors) and "_w" not in leaf:
            weights[name] = uniform
        elif leaf == "weight" and len(shape) == 2:
            weights[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        else:
            weights[name] = torch.full(shape, float(leaf == "weight"))
    return weights


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
        model_config = make_model_config(**changes)
        generator = torch.Generator().manual_seed(seed)
        if model_config.version == "x070":
            start = initial_weights(model_config, seed)
        else:
            start = older_weights(model_config, generator)
        weights = {}
        for key, value in start.items():
            scale = 0.05 if value.ndim == 2 else 0.1
            noise = torch.randn(value.shape, generator=generator) * scale
            weights[key] = (value + noise).to(dtype)
        write_weights(tmp_path / name, weights)
        return tmp_path / name

    return make


@pytest.fixture
def decompose_otherwise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, torch gives other factors of every matrix, as valid: half of them negative.

    AdaMSS numbers the clusters that it finds the other way round.
    """
    from peft.tuners.adamss import layer as adamss

    def signs(count: int) -> torch.Tensor:
        return 1.0 - 2.0 * (torch.arange(count) % 2)

    svd, qr, eigh = torch.linalg.svd, torch.linalg.qr, torch.linalg.eigh
    clustering = adamss.clustering_Z

    def other_svd(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        u, s, vh = svd(*args, **kwargs)
        return u * signs(u.shape[-1]), s, vh * signs(vh.shape[-2])[:, None]

    def other_qr(*args: Any, **kwargs: Any) -> Any:
        found = qr(*args, **kwargs)
        q, r = found
        return type(found)((q * signs(q.shape[-1]), r * signs(r.shape[-2])[:, None]))

    def other_eigh(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        values, vectors = eigh(*args, **kwargs)
        return values, vectors * signs(vectors.shape[-1])

    def other_clustering(*args: Any) -> tuple[torch.Tensor, int]:
        cluster, count = clustering(*args)
        return count - 1 - cluster, count

    def begin() -> None:
        monkeypatch.setattr(adamss, "clustering_Z", other_clustering)
        for name, other in (("svd", other_svd), ("qr", other_qr), ("eigh", other_eigh)):
            monkeypatch.setattr(torch.linalg, name, other)

    return begin


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
def official_logits_of() -> Callable[..., list[torch.Tensor]]:
    """Logits (T, V) of the rwkv package for each of some files, all tokens at once.

    What the package can read is fixed when it is imported, so RWKV-5 and 6 need another process.
    """

    def run(paths: list[Path], tokens: list[int], version: str = "x070") -> list[torch.Tensor]:
        if version != "x070":
            code = (
                "import sys, torch\n"
                "from rwkv.model import RWKV\n"
                "tokens = [int(t) for t in sys.argv[1].split()]\n"
                "for path in sys.argv[2:]:\n"
                "    model = RWKV(model=path, strategy='cpu fp32')\n"
                "    logits = model.forward(tokens, None, full_output=True)[0]\n"
                "    torch.save(logits, f'{path}.logits')\n"
            )
            given = [str(path.with_suffix("")) for path in paths]
            subprocess.run(
                [sys.executable, "-c", code, " ".join(map(str, tokens)), *given],
                check=True,
                env={**os.environ, "RWKV_V7_ON": "0"},
                capture_output=True,
            )
            return [torch.load(f"{path}.logits") for path in given]
        from rwkv.model import RWKV

        models = (RWKV(model=str(p.with_suffix("")), strategy="cpu fp32") for p in paths)
        return [model.forward(tokens, None, full_output=True)[0] for model in models]

    return run


@pytest.fixture(scope="session")
def official_logits(
    official_logits_of: Callable[..., list[torch.Tensor]],
) -> Callable[..., torch.Tensor]:
    """As `official_logits_of`, for one file."""

    def run(path: Path, tokens: list[int], version: str = "x070") -> torch.Tensor:
        (logits,) = official_logits_of([path], tokens, version)
        return logits

    return run
