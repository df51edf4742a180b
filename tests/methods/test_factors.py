"""Files hold what a method made of the base weights by decomposing them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkv_peft
from rwkv_peft.checkpoint.adapter import attach_saved, read_adapter, write_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.methods.catalog import method_config
from rwkv_peft.models.base import RWKV

# what torch says of the sparse matrix that peft's FRoD makes
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
TOKENS = torch.arange(1, 25).view(1, 24)
# those whose change depends on the factors that were found
METHODS = ("adamss", "frod", "psoft", "osf")
WEIGHTS = "adapter_model.safetensors"
Otherwise = Callable[[], None]


@pytest.fixture
def base(make_model_file: Callable[..., Path]) -> Path:
    return make_model_file(dtype=torch.float32)


def move(tensors: Iterator[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tensors:
            p += torch.randn(p.shape, generator=generator) * 0.02


def trained(base: Path, method: str, **options: Any) -> tuple[RWKV, Attachment]:
    """A model whose adapter has been moved at random, as if trained."""
    model = rwkv_peft.load_model(base)
    attachment = attach(model, method, options)
    move(iter(attachment.values()))
    return model, attachment


def answers(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(TOKENS)[0].detach()
    return logits


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_whoever_decomposes_otherwise_reads_the_same_adapter(
    method: str,
    dtype: torch.dtype,
    make_model_file: Callable[..., Path],
    decompose_otherwise: Otherwise,
    tmp_path: Path,
) -> None:
    base = make_model_file(dtype=dtype)
    model = rwkv_peft.load_model(base, dtype=str(dtype).removeprefix("torch."))
    attachment = attach(model, method, {})
    move(iter(attachment.values()))
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "one.pth", dtype="fp32", compare=0)
    decompose_otherwise()
    again = rwkv_peft.load_model(
        base, adapter=tmp_path / "adapter", dtype=str(dtype).removeprefix("torch.")
    )
    assert torch.equal(answers(again), answers(model))
    rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "other.pth", dtype="fp32", compare=0)
    one, other = read_weights(tmp_path / "one.pth"), read_weights(tmp_path / "other.pth")
    assert all(torch.equal(other[name], one[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_in_bf16_is_read_in_float32(
    method: str, model_file: Path, tmp_path: Path
) -> None:
    def model(dtype: str, **given: Any) -> RWKV:
        return rwkv_peft.load_model(model_file, dtype=dtype, **given)

    # float32 weights decompose into other factors than the same ones in bf16
    rounding = (answers(model("bfloat16")) - answers(model("float32"))).abs().max()
    adapted = model("bfloat16")
    attachment = attach(adapted, method, {})
    move(iter(attachment.values()))
    write_adapter(tmp_path / "adapter", attachment, attachment, base=model_file)
    finer = model("float32", adapter=tmp_path / "adapter")
    assert (answers(finer) - answers(adapted)).abs().max() < 2 * rounding


@pytest.mark.parametrize("method", METHODS)
def test_another_number_of_threads_reads_the_same_adapter(
    method: str, base: Path, tmp_path: Path
) -> None:
    with threads(2):
        model, attachment = trained(base, method)
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    with threads(1):
        again = rwkv_peft.load_model(base, adapter=tmp_path / "adapter")
        # U of FRoD is solved for again, in float64, so that it may round to another float32
        close = {"rtol": 0, "atol": 1e-5 if method == "frod" else 0}
        torch.testing.assert_close(answers(again), answers(model), **close)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_between_the_factors_of_the_file(
    method: str, base: Path, decompose_otherwise: Otherwise, tmp_path: Path
) -> None:
    model, attachment = trained(base, method)
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    decompose_otherwise()
    again = rwkv_peft.load_model(base)
    resumed, _ = attach_saved(again, tmp_path / "adapter")
    for each in (model, again):
        each.train()(TOKENS)[0].square().sum().backward()
    for name, parameter in attachment.items():
        assert parameter.grad is not None
        assert torch.equal(resumed[name].grad, parameter.grad), name  # type: ignore[arg-type]
    write_adapter(tmp_path / "again", resumed, resumed, base=base)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.filterwarnings("default:.*lacks the factors")
def test_projections_that_a_config_leaves_out_are_made_again_and_a_note_says_so(
    base: Path, tmp_path: Path, cli: Callable[..., SimpleNamespace]
) -> None:
    model, attachment = trained(base, "frod", save_projection=False)
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    assert not any("frod_V" in name for name in load_file(tmp_path / "adapter" / WEIGHTS))
    with pytest.warns(UserWarning, match="lacks the factors.*number of threads"):
        again = rwkv_peft.load_model(base, adapter=tmp_path / "adapter")
    assert torch.equal(answers(again), answers(model))
    told = cli(
        *("merge", "--base_model", base, "--adapter", tmp_path / "adapter"),
        *("--output", tmp_path / "merged.pth", "--compare", 0),
    )
    notes = [line for line in told.err.splitlines() if "lacks the factors" in line]
    assert told.code == 0 and len(notes) == 1 and notes[0].startswith("note: ")


@pytest.mark.parametrize("method", [*METHODS, "vera"])
def test_adapters_go_to_peft_and_come_from_it(method: str, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model, attachment = trained(base, method)
    write_adapter(tmp_path / "ours", attachment, attachment, base=base)
    theirs = PeftModel.from_pretrained(rwkv_peft.load_model(base), str(tmp_path / "ours"))
    assert torch.equal(answers(theirs.base_model.model), answers(model))

    config = method_config(method, {}, "x070")
    theirs = PeftModel(rwkv_peft.load_model(base), config, autocast_adapter_dtype=False)
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    if method in ("adamss", "psoft", "osf"):
        with pytest.warns(UserWarning, match="lacks the factors"):
            again = rwkv_peft.load_model(base, adapter=tmp_path / "theirs")
    else:
        again = rwkv_peft.load_model(base, adapter=tmp_path / "theirs")
    torch.testing.assert_close(answers(again), answers(theirs.base_model.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_with_a_part_of_the_factors_or_others_is_refused(
    method: str, base: Path, tmp_path: Path
) -> None:
    _, attachment = trained(base, method)
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    trainable = {name.replace(".default", "") for name in attachment}
    name = next(n for n in sorted(tensors) if n.removeprefix("base_model.model.") not in trainable)
    save_file({n: x for n, x in tensors.items() if n != name}, path)
    with pytest.raises(CheckpointError, match=r"1 tensors differ.*missing in the file"):
        rwkv_peft.load_model(base, adapter=tmp_path / "adapter")
    save_file(tensors | {f"{name}_more": tensors[name].clone()}, path)
    with pytest.raises(CheckpointError, match=r"1 tensors differ.*not wanted in the model"):
        rwkv_peft.load_model(base, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("method", ["psoft", "osf"])
def test_an_adapter_that_changes_nothing_is_an_error_whoever_decomposes(
    method: str, base: Path, decompose_otherwise: Otherwise, tmp_path: Path
) -> None:
    attachment = attach(rwkv_peft.load_model(base), method, {})
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    decompose_otherwise()
    with pytest.raises(CheckpointError, match="changes nothing"):
        rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "merged.pth")


def test_copies_of_the_base_are_not_saved(base: Path, tmp_path: Path) -> None:
    _, attachment = trained(base, "trainable_tokens", token_indices=[1, 2])
    write_adapter(tmp_path / "adapter", attachment, attachment, base=base)
    names = read_adapter(tmp_path / "adapter").tensors
    assert list(names) == ["base_model.model.emb.trainable_tokens_delta"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["token_indices"] == [1, 2]
