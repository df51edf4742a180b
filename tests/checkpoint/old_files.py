"""Adapter files of older RWKV-PEFT, made from its equations, and bases merged by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.pth import read_weights, write_weights

Weights = dict[str, Tensor]
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
