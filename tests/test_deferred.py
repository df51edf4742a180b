"""The command line imports what it uses, and peft without transformers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rwkv_peft import deferred
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.run import train

COMMANDS = """
import sys
from rwkv_peft.cli.main import main

model, data, out, extra = sys.argv[1:]
allowed = set()

def run(*args, using=()):
    allowed.update(using)
    assert main([str(a) for a in args]) == 0, args
    heavy = {"torch", "peft", "transformers", "scipy", "datasets", "torch.distributed.tensor"}
    found = heavy & sys.modules.keys() - allowed
    assert not found, (args, found)

run("--help")
run("data", data)
run("inspect", model, using=["torch"])
answer = ("--prompt", "hi", "--max_tokens", 2, "--accelerator", "cpu")
run("generate", "--load_model", model, *answer)
given = ("--data_file", data, "--accelerator", "cpu", "--random_seed", 3, "--epoch_count", 1)
given += ("--precision", "fp32", "--lr_init", 0.01)
# torch.optim imports it
compiler = ["torch.distributed.tensor"]
run("train", model, *given, "--proj_dir", f"{out}/full", "--peft", "none", using=compiler)
run("train", model, *given, "--proj_dir", f"{out}/state", "--peft", "state")
run("train", model, *given, "--proj_dir", f"{out}/lora", using=["peft"])
adapter = f"{out}/lora/rwkv-0-adapter"
run("generate", "--load_model", model, "--adapter", adapter, *answer)
merged = ("--output", f"{out}/merged.pth")
run("merge", "--base_model", model, "--adapter", adapter, *merged)

import peft
from peft.tuners.tuners_utils import PreTrainedModel
assert not isinstance(3, PreTrainedModel) and "transformers" not in sys.modules
from peft.tuners.peanut.config import ACT2FN
assert "relu" in ACT2FN and ACT2FN["relu"](-1 * __import__("torch").ones(1)) == 0
import transformers
assert transformers.PreTrainedModel.__name__ == "PreTrainedModel"
small = transformers.LlamaModel(transformers.LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
assert isinstance(small, PreTrainedModel) and not isinstance(3, PreTrainedModel)
"""


def test_commands_import_what_they_use_and_compute_the_same(
    make_model_file: Callable[..., Path], make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    model, data = make_model_file(), make_data_file(["one text", "and another"])
    code = [sys.executable, "-W", "ignore", "-c", COMMANDS, model, data, tmp_path, "cpu"]
    done = subprocess.run([str(x) for x in code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # here peft is imported with transformers
    config = TrainConfig(
        load_model=str(model),
        data_file=str(data),
        proj_dir=str(tmp_path / "here"),
        accelerator="cpu",
        random_seed=3,
        epoch_count=1,
        precision="fp32",
        lr_init=0.01,
    )
    train(config)
    here, there = (tmp_path / name / "rwkv-0.pth" for name in ("here", "lora"))
    assert here.read_bytes() == there.read_bytes()
    assert (tmp_path / "merged.pth").read_bytes() == here.read_bytes()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a package of one line, which imports from another, with that one deferred."""
    (tmp_path / "heavy_one").mkdir()
    (tmp_path / "heavy_one" / "__init__.py").write_text("class Model:\n    number = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deferred, "LIBRARY", "light_one")
    monkeypatch.setattr(deferred, "DEFERRED", "heavy_one")
    for name in ("light_one", "light_one.part", "heavy_one"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def make(line: str) -> ModuleType:
        (tmp_path / "light_one").mkdir()
        (tmp_path / "light_one" / "__init__.py").write_text("from . import part\n")
        (tmp_path / "light_one" / "part.py").write_text(f"from heavy_one import Model\n{line}\n")
        with deferred.defer_transformers():
            import light_one.part  # type: ignore[import-not-found]
        found: ModuleType = light_one.part
        return found

    return make


def test_a_name_becomes_what_it_stands_for_when_it_is_used(
    library: Callable[[str], ModuleType],
) -> None:
    part = library("class Mine(Model): pass\ndef f(x: Model | int): return isinstance(x, Model)")
    assert "heavy_one" not in sys.modules
    assert not part.f(3) and "heavy_one" not in sys.modules
    assert part.Model.number == 3 and "heavy_one" in sys.modules
    from heavy_one import Model  # type: ignore[import-not-found]

    assert part.f(part.Model()) and part.f(Model()) and not part.f(3)


@pytest.mark.parametrize("line", ["x = Model.number + 1", "x = len([Model]) + Model().number"])
def test_a_use_at_the_import_imports_it_at_once(
    line: str, library: Callable[[str], ModuleType]
) -> None:
    assert library(line).x == 4


def test_what_a_stand_in_cannot_do_has_all_imported_again(
    library: Callable[[str], ModuleType],
) -> None:
    part = library("x = issubclass(Model, object)")
    assert part.x and "heavy_one" in sys.modules
