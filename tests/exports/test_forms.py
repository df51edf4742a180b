"""Forms of Hugging Face folders that are not those we write: of other times and programs."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.exports.hf import ARITHMETIC
from tests.exports.readers import fla_models
from tests.exports.test_round_trips import export

Cli: TypeAlias = Callable[..., SimpleNamespace]
SHIFTS = "rwkvag"


def native(name: str, x: Tensor, *, prefix: str, embedding: str, is_linear: bool) -> Any:
    """A tensor as a form of transformers' class of RWKV-7 has it."""
    if name == "head.weight":
        return name, x
    leaf = name.rpartition(".")[2]
    if is_linear and leaf in {f"{a}{n}" for a in "wavg" for n in "12"}:
        return f"{prefix}{name}.weight", x.t().contiguous()
    return prefix + name.replace("emb.weight", f"{embedding}.weight"), x


NATIVE = {
    "first": {"prefix": "model.", "embedding": "emb", "is_linear": False},
    "prefixed": {"prefix": "rwkv7.", "embedding": "emb", "is_linear": False},
    "prefixed, embeddings": {"prefix": "rwkv7.", "embedding": "embeddings", "is_linear": False},
    "embeddings": {"prefix": "model.", "embedding": "embeddings", "is_linear": False},
    "of vllm-rwkv": {"prefix": "model.", "embedding": "embeddings", "is_linear": True},
}


@pytest.mark.parametrize("form", NATIVE)
@pytest.mark.parametrize("has_first", [False, True])
def test_every_form_of_the_native_layout_is_opened(
    form: str, has_first: bool, make_model_file: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    official = make_model_file(n_layer=3, has_first_value_mix=has_first)
    folder = export(official, "hf", tmp_path / "folder")
    wanted = read_weights(official)
    held = dict(native(name, x, **NATIVE[form]) for name, x in wanted.items())
    save_file(held, folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        found = read_weights(path)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(x, wanted[name]) for name, x in found.items())
        assert cli("generate", path, "--prompt", "a", "--max_tokens", 1).code == 0
    exported = read_weights(export(folder, "pth", tmp_path / "o.pth"))
    assert all(torch.equal(x, wanted[name]) for name, x in exported.items())


def test_the_first_form_of_fla_is_opened_as_fla_reads_it(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """It has the vectors of the token shift in one tensor, as published folders still have."""
    official = make_model_file(n_layer=3, dtype=torch.float32)
    folder = export(official, "hf-fla", tmp_path / "folder")
    held = load_file(folder / "model.safetensors")
    for layer in range(3):
        names = [f"model.layers.{layer}.attn.x_{x}" for x in SHIFTS]
        # another vector for each, so that their order counts
        held[f"model.layers.{layer}.attn.x_x"] = torch.stack([held.pop(x).view(-1) for x in names])
    save_file(held, folder / "model.safetensors")
    wanted, found = read_weights(official), read_weights(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())
    models = fla_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = models.RWKV7ForCausalLM(models.RWKV7Config.from_pretrained(folder))
    # its migration puts the vectors beside the old tensor
    theirs.model.load_state_dict(held, strict=False)
    for x in SHIFTS:
        name = f"model.layers.2.attn.x_{x}"
        assert torch.equal(held[name], found[f"blocks.2.att.x_{x}"])


@pytest.mark.parametrize("to", ["hf", "hf-fla"])
def test_a_config_by_which_other_numbers_come_is_refused(
    to: str, make_model_file: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    folder = export(make_model_file(), to, tmp_path / "folder")
    config = folder / "config.json"
    good = json.loads(config.read_text())
    assert all(good.get(key, value) == value for key, value in ARITHMETIC.items())
    for key, value in ARITHMETIC.items():
        other = {float: 1e-3, bool: not value, str: "gelu"}[type(value)]
        config.write_text(json.dumps(good | {key: other}))
        done = cli("inspect", folder)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert f"config.json says {key} {other}" in done.err
        config.write_text(json.dumps(good | {key: None}))
        assert cli("inspect", folder).code == 0


def test_a_folder_that_lacks_its_head_is_told(
    make_model_file: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    for to, name in {"hf": "head.weight", "hf-fla": "lm_head.weight"}.items():
        folder = export(make_model_file(), to, tmp_path / to)
        held = load_file(folder / "model.safetensors")
        del held[name]
        save_file(held, folder / "model.safetensors")
        done = cli("inspect", folder)
        assert done.code == 2 and "head.weight" in done.err, done.err
