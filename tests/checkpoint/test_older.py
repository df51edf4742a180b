"""Adapter files of older RWKV-PEFT, made from its equations, against bases merged by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.errors import CheckpointError
from tests.checkpoint.old_files import ALPHA, FORMS, VERSIONS, Weights, old_pissa, old_run, scale

MakeModel = Callable[..., Path]
TOKENS = torch.arange(1, 25).view(1, 24)


@pytest.mark.parametrize(
    ("form", "version"),
    [
        *((form, "x070") for form in FORMS),
        ("lora with parts", "x060"),
        ("bat", "x060"),
        ("lora with parts", "x052"),
        ("disha", "x052"),
    ],
)
@torch.no_grad()
def test_an_old_file_has_the_logits_of_its_equation_in_the_official_runtime(
    form: str,
    version: str,
    make_model_file: MakeModel,
    official_logits: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    base = make_model_file(dtype=torch.float32, **VERSIONS[version])
    old, hand = old_run(tmp_path, base, form)
    logits = rwkv_peft.load_model(base, adapter=old, **scale(form))(TOKENS)[0][0]
    assert (logits - rwkv_peft.load_model(base)(TOKENS)[0][0]).abs().max() > 1e-2
    official = official_logits(hand, TOKENS[0].tolist(), version)
    torch.testing.assert_close(logits, official, rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", ["x060", "x070"])
@torch.no_grad()
def test_an_old_pissa_pair_has_the_logits_of_its_equation_in_the_official_runtime(
    version: str,
    make_model_file: MakeModel,
    official_logits: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    base = make_model_file(dtype=torch.float32, **VERSIONS[version])
    old, init, hand = old_pissa(tmp_path, base)
    logits = rwkv_peft.load_model(base, adapter=old, pissa_init=init)(TOKENS)[0][0]
    assert (logits - rwkv_peft.load_model(base)(TOKENS)[0][0]).abs().max() > 1e-2
    official = official_logits(hand, TOKENS[0].tolist(), version)
    torch.testing.assert_close(logits, official, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["disha", "bat", "bone that does not divide"])
def test_an_old_file_is_merged_as_its_equation_says(
    form: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    base = make_model_file(dtype=torch.float32)
    old, hand = old_run(tmp_path, base, form)
    rwkv_peft.merge(base, old, tmp_path / "merged.pth")
    merged, expected = read_weights(tmp_path / "merged.pth"), read_weights(hand)
    for name, x in expected.items():
        torch.testing.assert_close(merged[name], x, rtol=0, atol=1e-6)


FACTOR = "blocks.0.att.key.lora_A"
# what is done to a good LoRA file of rank 4, and the line that refuses it
BROKEN: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "half a pair": (
        lambda f: {n: x for n, x in f.items() if n != FACTOR},
        r"incomplete: blocks\.0\.att\.key\.lora_A is missing",
    ),
    "swapped": (lambda f: f | {FACTOR: f[FACTOR].T.contiguous()}, r"are no \(R, in\) and \(out"),
    "a rank of its own half": (lambda f: f | {FACTOR: f[FACTOR][:2]}, r"are no \(R, in\) and"),
    "no rank": (
        lambda f: f | {FACTOR: f[FACTOR][:0], FACTOR[:-1] + "B": f[FACTOR[:-1] + "B"][:, :0]},
        r"are no \(R, in\) and",
    ),
    "not finite": (lambda f: f | {FACTOR: f[FACTOR] / 0}, "values that are not finite"),
    "another width": (
        lambda f: {n: x[:, :64] if n.endswith("A") else x for n, x in f.items()},
        r"does not fit this model, \d+ tensors differ, first blocks",
    ),
    "another depth": (
        lambda f: {n: x for n, x in f.items() if n.startswith("blocks.0.")},
        r"does not fit this model, 12 tensors differ, first blocks\.1\..*missing in the file",
    ),
    "a module that is none": (
        lambda f: {n.replace("att.key", "att.gate"): x for n, x in f.items()},
        "does not fit this model: target_modules: 'att.gate' is not a module",
    ),
    "an unknown tensor": (lambda f: f | {"blocks.0.att.m": f[FACTOR]}, "att.m: .* not wanted in"),
    "another shape of a part": (
        lambda f: f | {"emb.weight": f[FACTOR]},
        r"first emb\.weight: \(4, 128\) in the file, \(320, 128\) in the model",
    ),
    "never trained": (
        lambda f: {n: x * 0 if n.endswith("B") else x for n, x in f.items()},
        "changes nothing in the base: it was never trained",
    ),
    "a part alone": (lambda f: {"emb.weight": f[FACTOR]}, "holds no adapter: give a folder"),
    "nothing": (lambda f: {}, "holds no adapter: give a folder"),
    "two methods": (lambda f: f | {"head.disha": f[FACTOR]}, "holds two kinds of adapters"),
    "blocks of two ranks": (
        lambda f: {"head.disha": f[FACTOR], "emb.disha": f[FACTOR][:2]},
        r"blocks of the shapes \[\(2, 128\), \(4, 128\)\], which are neither",
    ),
    "a block that is no square": (
        lambda f: {"head.bone": f[FACTOR].view(4, 2, 64)},
        "which are neither all",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    name: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    base = make_model_file()
    old, _ = old_run(tmp_path, base, "lora")
    change, message = BROKEN[name]
    torch.save(change(torch.load(old)), old)
    alpha = None if "block" in name else ALPHA
    with pytest.raises(CheckpointError, match=message) as caught:
        rwkv_peft.load_model(base, adapter=old, lora_alpha=alpha)
    assert "\n" not in str(caught.value)


def test_what_a_file_does_not_hold_is_asked_for_and_not_guessed(
    make_model_file: MakeModel, tmp_path: Path
) -> None:
    base = make_model_file()
    old, _ = old_run(tmp_path, base, "lora")
    with pytest.raises(CheckpointError, match="rank 4 and not how it is scaled: give --lora_alpha"):
        rwkv_peft.load_model(base, adapter=old)
    with pytest.raises(CheckpointError, match="lora_alpha: got '8', allowed is a number"):
        rwkv_peft.load_model(base, adapter=old, lora_alpha="8")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="must be above 0, got 0"):
        rwkv_peft.load_model(base, adapter=old, lora_alpha=0)
    pissa, init, _ = old_pissa(tmp_path, base)
    with pytest.raises(CheckpointError, match="PiSSA has a scale of 1, leave it out"):
        rwkv_peft.load_model(base, adapter=pissa, pissa_init=init, lora_alpha=32)
    (tmp_path / "other").mkdir()
    _, other, _ = old_pissa(tmp_path / "other", base, rank=2)
    with pytest.raises(
        CheckpointError, match=r"does not belong to .*the init_pissa\.pth of the same"
    ):
        rwkv_peft.load_model(base, adapter=pissa, pissa_init=other)
    torch.save(
        {n.replace("model.", "").replace("init_", ""): x for n, x in torch.load(init).items()},
        pissa,
    )
    with pytest.raises(CheckpointError, match="changes nothing in the base"):
        rwkv_peft.load_model(base, adapter=pissa, pissa_init=init)
    disha_file, _ = old_run(tmp_path, base, "disha")
    with pytest.raises(CheckpointError, match="MiSS, which has no lora_alpha"):
        rwkv_peft.load_model(base, adapter=disha_file, lora_alpha=32)
