"""Adapter files of older RWKV-PEFT, made here from its equations, against bases merged by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.errors import CheckpointError

Weights = dict[str, Tensor]
MakeModel = Callable[..., Path]
TOKENS = torch.arange(1, 25).view(1, 24)
RANK, ALPHA = 4, 24
VERSIONS: dict[str, dict[str, Any]] = {
    "x052": {"version": "x052", "ranks": {}, "dim_ffn": 448},
    "x060": {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448},
    "x070": {},
}


def modules(base: Weights) -> list[str]:
    """What older RWKV-PEFT adapted: the matrices of both mixers."""
    return [
        n.removesuffix(".weight")
        for n in base
        if base[n].ndim == 2 and n[0] == "b" and n.endswith(".weight")
    ]


def lora(base: Weights, draw: Callable[..., Tensor]) -> tuple[Weights, Weights]:
    file, merged = {}, {}
    for m in modules(base):
        out, n = base[f"{m}.weight"].shape
        a, b = draw(RANK, n), draw(out, RANK)
        file |= {f"{m}.lora_A": a, f"{m}.lora_B": b}
        merged[f"{m}.weight"] = base[f"{m}.weight"] + ALPHA / RANK * b @ a
    return file, merged


def lora_and_parts(base: Weights, draw: Callable[..., Tensor]) -> tuple[Weights, Weights]:
    file, merged = lora(base, draw)
    names = ["emb.weight", "blocks.1.ln2.bias", "ln_out.weight"]
    names += [n for n in base if n.endswith((".x_r", ".time_maa_x", ".time_faaaa"))]
    parts = {n: base[n] + draw(*base[n].shape) for n in names}
    return {**parts, **{f"model.{n}": x for n, x in file.items()}}, merged | parts


def some_modules(base: Weights, draw: Callable[..., Tensor]) -> tuple[Weights, Weights]:
    file, merged = lora(base, draw)
    kept = ("blocks.1.att.key", "blocks.0.ffn.value")
    return (
        {n: x for n, x in file.items() if n.startswith(kept)},
        {n: x for n, x in merged.items() if n.startswith(kept)},
    )


def disha(base: Weights, draw: Callable[..., Tensor], rank: int = 8) -> tuple[Weights, Weights]:
    """W[:, j] += D[j mod R, :] for every input j."""
    file, merged = {}, {}
    for m in modules(base):
        out, n = base[f"{m}.weight"].shape
        file[f"{m}.disha"] = d = draw(rank, out)
        merged[f"{m}.weight"] = base[f"{m}.weight"] + d[torch.arange(n) % rank].T
    return file, merged


def bone_that_does_not_divide(
    base: Weights, draw: Callable[..., Tensor]
) -> tuple[Weights, Weights]:
    file, merged = disha(base, draw, rank=12)
    return {n.replace("disha", "bone"): x for n, x in file.items()}, merged


def bat(base: Weights, draw: Callable[..., Tensor]) -> tuple[Weights, Weights]:
    return blocks_of(base, draw, is_along_inputs=True)


def bat_along_outputs(base: Weights, draw: Callable[..., Tensor]) -> tuple[Weights, Weights]:
    return blocks_of(base, draw, is_along_inputs=False)


def blocks_of(
    base: Weights, draw: Callable[..., Tensor], *, is_along_inputs: bool
) -> tuple[Weights, Weights]:
    """W[o, i] += W[o, i] D + D for each block, D of its inputs i (or outputs o)."""
    rank, file, merged = 16, {}, {}
    for m in modules(base):
        w = base[f"{m}.weight"]
        new = w.clone()
        d = draw(w.shape[is_along_inputs] // rank, rank, rank)
        for o in range(0, w.shape[0], rank):
            for i in range(0, w.shape[1], rank):
                block, own = w[o : o + rank, i : i + rank], d[(i if is_along_inputs else o) // rank]
                new[o : o + rank, i : i + rank] += block @ own + own
        file[f"{m}.bone"], merged[f"{m}.weight"] = d, new
    return file, merged


FORMS = {
    "lora": lora,
    "lora with parts": lora_and_parts,
    "some modules": some_modules,
    "disha": disha,
    "bone that does not divide": bone_that_does_not_divide,
    "bat": bat,
    "bat along outputs": bat_along_outputs,
}


def drawing(seed: int = 5) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.05


def old_run(folder: Path, base: Path, form: str) -> tuple[Path, Path]:
    """An old file of a form, and the base with it merged by hand."""
    weights = {n: x.double() for n, x in read_weights(base).items()}
    draw = drawing()
    file, merged = FORMS[form](weights, lambda *shape: draw(*shape).double())
    torch.save({n: x.float() for n, x in file.items()}, folder / "old.pth")
    write_weights(folder / "hand.pth", {n: merged.get(n, x).float() for n, x in weights.items()})
    return folder / "old.pth", folder / "hand.pth"


def scale(form: str) -> dict[str, Any]:
    return {"lora_alpha": ALPHA} if "lora" in form or form == "some modules" else {}


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


def old_pissa(folder: Path, base: Path, rank: int = RANK) -> tuple[Path, Path, Path]:
    """What an old PiSSA run left, and its merge by hand: W - B0 A0 + B A, whatever lora_alpha."""
    weights = {n: x.double() for n, x in read_weights(base).items()}
    draw, file, start, merged = drawing(), {}, {}, {}
    for m in modules(weights):
        w = weights[f"{m}.weight"]
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        start |= {f"model.{m}.init_lora_A": a.float(), f"model.{m}.init_lora_B": b.float()}
        a, b = a.float().double(), b.float().double()
        new_a, new_b = (x + draw(*x.shape).double() for x in (a, b))
        file |= {f"{m}.lora_A": new_a.float(), f"{m}.lora_B": new_b.float()}
        merged[f"{m}.weight"] = w - b @ a + new_b.float().double() @ new_a.float().double()
    torch.save(file, folder / "rwkv-0.pth")
    torch.save(start, folder / "init_pissa.pth")
    write_weights(folder / "hand.pth", {n: merged.get(n, x).float() for n, x in weights.items()})
    return folder / "rwkv-0.pth", folder / "init_pissa.pth", folder / "hand.pth"


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
    "two ranks": (
        lambda f: f | {FACTOR: f[FACTOR][:2], FACTOR[:-1] + "B": f[FACTOR[:-1] + "B"][:, :2]},
        r"holds ranks \[2, 4\]",
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
        "does not fit this model: target_modules: 'att.gate' is no module",
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
