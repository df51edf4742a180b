"""Adapters and states from one form of file to another."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.checkpoint.adapter import attach_to_base, read_adapter
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.folder import FILES, SavedAdapter, write_folder
from rwkv_peft.checkpoint.older import LegacyAdapterHints, make_start_file, name_targets
from rwkv_peft.checkpoint.pth import infer_model_config, read_weights, write_weights
from rwkv_peft.checkpoint.state import is_state_file, read_state, write_state
from rwkv_peft.checkpoint.stream import ENDINGS, Spec, StoredDtype, write_tensors
from rwkv_peft.device import dtype_of
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.guard import require_free
from rwkv_peft.methods import residual
from rwkv_peft.methods.attach import PREFIX
from rwkv_peft.methods.miss import as_lora
from rwkv_peft.models.base import RWKV
from rwkv_peft.writing import atomic_folder

if TYPE_CHECKING:
    from peft import LoraConfig

Form = Literal["peft", "pth", "residual"]
# of the weight files of other programs, which nothing that is written here is
FOREIGN_ENDINGS = (".pt", ".bin", ".st", ".ckpt", ".gguf", ".ggml", ".onnx")
RESIDUAL, ADAPTER_FOLDER, START = "residual.pth", "adapter", "init_pissa.pth"


def convert(
    source: str | Path,
    output: str | Path,
    base_model: str | Path,
    *,
    to: Form = "peft",
    lora_alpha: float | None = None,
    pissa_init: str | Path = "",
    dtype: StoredDtype = "keep",
    force: bool = False,
    overwrite: bool = False,
) -> str:
    """Writes an adapter or a state in another form, and gives a line on what was written.

    Args:
        source: a folder in peft's format, or an adapter or state file of any RWKV-PEFT.
        output: what to write; a state becomes a state file.
        base_model: the file that it was trained on.
        to: 'peft', a folder with the fingerprint of its base; 'pth', a file of `lora_A` and
            `lora_B`, which programs that attach LoRA to RWKV read; 'residual', for PiSSA, a folder
            of the base without what PiSSA took from it (`residual.pth`), the adapter on that
            (`adapter`) and what was taken (`init_pissa.pth`), as when it was trained.
        lora_alpha: of the training of an older LoRA file, which does not hold it.
        pissa_init: for PiSSA, the run's init_pissa.pth; with it the `adapter` of a residual form
            becomes one on the original base again.
        dtype: of the matrices of `residual.pth`.
        force: take an adapter that was trained on another base.
        overwrite: replace what has the name of the output, if it is nothing that is read.
    Raises:
        ConfigError: the output cannot have this name.
        CheckpointError: the source cannot be read, does not fit the base or has no such form.
    """
    output = Path(output)
    _require_free(output, to, [source, base_model, pissa_init], overwrite)
    weights = read_weights(base_model)
    model_config = infer_model_config(weights)
    state = read_state(source, model_config) if is_state_file(source) else None
    _require_form(output, to, is_state=state is not None)
    if state is not None:
        if not any(bool(x.any()) for x in state.values()):
            raise CheckpointError(f"{source} changes nothing: all of its state is zero")
        write_state(output, state)
        return f"wrote {output}: a state of {len(state)} tensors"
    own, hints = fingerprint(weights), LegacyAdapterHints(lora_alpha, pissa_init)
    adapter = read_adapter(source, hints, base_fingerprint=own, force=force)
    if to == "residual":
        return _write_residual(source, output, weights, adapter, dtype)
    model = attach_to_base(weights, adapter, source)[0]
    if to == "pth":
        return _write_pth(source, output, weights, model, adapter)
    note = {**adapter.note, "base": own}
    write_folder(output, adapter._replace(note=note), base_model)
    return f"wrote {output}: {_describe(adapter)}, {len(adapter.tensors)} tensors"


def _require_free(output: Path, to: Form, inputs: list[str | Path], overwrite: bool) -> None:
    owned = {"peft": FILES, "residual": (RESIDUAL, ADAPTER_FOLDER, START), "pth": None}[to]
    if output.suffix in ENDINGS:
        owned = None
    elif output.suffix in FOREIGN_ENDINGS:
        raise ConfigError(
            f"--output {output}: what is written is a folder, or a file named .pth or .safetensors"
        )
    require_free(output, inputs=inputs, overwrite=overwrite, owned=owned)
    if to == "residual":
        require_free(output / ADAPTER_FOLDER, inputs=inputs, overwrite=overwrite, owned=FILES)


def _require_form(output: Path, to: Form, *, is_state: bool) -> None:
    if is_state and to != "peft":
        raise ConfigError(f"--to {to} is for adapters: a state has one form, leave it out")
    is_file = output.suffix in ENDINGS
    if is_file != (is_state or to == "pth"):
        wanted = f"a file's name that ends in {' or '.join(ENDINGS)}"
        wanted = "a folder's name" if is_file else wanted
        raise ConfigError(f"--output {output}: {wanted} is needed here")


def _describe(adapter: SavedAdapter) -> str:
    config = adapter.config
    rank, alpha = (getattr(config, name, None) for name in ("r", "lora_alpha"))
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    kind += f" of rank {rank}" if rank is not None else ""
    return kind + (f", lora_alpha {alpha:g}" if alpha is not None else "")


def _iterate_factors(model: RWKV) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Module, A (R, in), B (out, R) and scale of every layer of LoRA or MiSS."""
    from peft.tuners.miss.layer import MissLinear

    for name, layer in residual.layers(model):
        (key,) = layer.lora_A
        a, b = layer.lora_A[key].weight.detach(), layer.lora_B[key].weight.detach()
        yield name, a, b, float(layer.scaling[key])
    for name, module in model.named_modules():
        if isinstance(module, MissLinear) and (factors := as_lora(module)):
            yield name, *factors, 1.0


class PlainLora(NamedTuple):
    """A LoRA as tables of plain tensors hold it.

    Attributes:
        factors: `M.lora_A` (R, in) and `M.lora_B` (out, R) of each matrix M.
        own: the model's own tensors that were trained beside them.
        alpha: with which it is to be used; a matrix gets alpha / R of its product.
    """

    factors: dict[str, Tensor]
    own: dict[str, Tensor]
    alpha: float


def to_plain_lora(
    source: str | Path, weights: Mapping[str, Tensor], model: RWKV, adapter: SavedAdapter
) -> PlainLora:
    """An attached adapter as a plain LoRA.

    Raises:
        CheckpointError: it is of a method that has no such form.
    """
    layers = list(_iterate_factors(model))
    plain = _pick_own_tensors(weights, adapter)
    _require_nothing_else(source, adapter, model, len(plain))
    given = float(getattr(adapter.config, "lora_alpha", 0))
    # the adapter's own lora_alpha if it fits every layer; otherwise B absorbs the difference
    fits = all(math.isclose(s * len(a), given, rel_tol=1e-6) for _, a, _, s in layers)
    alpha = given if fits else float(len(layers[0][1]))
    tensors: dict[str, Tensor] = {}
    for name, a, b, scale in layers:
        tensors[f"{name}.lora_A"] = a
        tensors[f"{name}.lora_B"] = b if fits else b * (scale * len(a) / alpha)
    return PlainLora(tensors, plain, alpha)


def _write_pth(
    source: str | Path,
    output: Path,
    weights: Mapping[str, Tensor],
    model: RWKV,
    adapter: SavedAdapter,
) -> str:
    layers = list(_iterate_factors(model))
    targets = tuple(f".{name}.weight" for name in name_targets(name for name, *_ in layers))
    if sum(f".{name}".endswith(targets) for name in weights) != len(layers):
        raise CheckpointError(
            f"{source} adapts the first layers alone, which a file without a config cannot say: "
            "use rwkv-peft merge"
        )
    factors, plain, alpha = to_plain_lora(source, weights, model, adapter)
    write_weights(output, factors | plain)
    return f"wrote {output}: a LoRA of {len(layers)} matrices, to be used with lora_alpha {alpha:g}"


def _pick_own_tensors(weights: Mapping[str, Tensor], adapter: SavedAdapter) -> dict[str, Tensor]:
    """The model's own tensors that an adapter holds."""
    names = {key: key.removeprefix(PREFIX) for key in adapter.tensors}
    return {name: adapter.tensors[key] for key, name in names.items() if name in weights}


def _require_nothing_else(
    source: str | Path, adapter: SavedAdapter, model: RWKV, num_plain: int
) -> None:
    from peft.tuners.lora.variants import MiCALinearVariant

    parts = (".lora_A.weight", ".lora_B.weight", ".miss_block")
    known = [n for n in adapter.tensors if n.endswith(parts)]
    # all variants compute otherwise but MiCA, which begins otherwise; bat is not of low rank
    variants = [v for _, layer in residual.layers(model) for v in layer.lora_variant.values()]
    is_plain = all(isinstance(variant, MiCALinearVariant) for variant in variants)
    is_plain &= getattr(adapter.config, "init_weights", None) != "bat"
    has_factors = next(_iterate_factors(model), None) is not None
    if not (is_plain and has_factors and len(known) + num_plain == len(adapter.tensors)):
        raise CheckpointError(
            f"{source} is no plain LoRA or MiSS, and no other method has this form: use "
            "rwkv-peft merge"
        )


def _write_residual(
    source: str | Path,
    output: Path,
    weights: Mapping[str, Tensor],
    adapter: SavedAdapter,
    dtype: StoredDtype,
) -> str:
    if not adapter.note.get("init"):
        raise CheckpointError(
            f"{source} took nothing from its base: only an adapter of PiSSA has a residual form"
        )
    values, start = residual.split_start(adapter.tensors)
    config = residual.with_rank(adapter.config, 0.5)
    adapter = SavedAdapter(config, values, {})
    model = attach_to_base(weights, adapter, source)[0]
    _require_nothing_else(source, adapter, model, len(_pick_own_tensors(weights, adapter)))
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    for name, _, b, scale in _iterate_factors(model):
        a_key, b_key = (f"{PREFIX}{name}.lora_{x}.weight" for x in "AB")
        # init_pissa.pth holds no scale: B absorbs it
        values[b_key], start[b_key] = b * scale, start[b_key] * scale
        taken[f"{name}.weight"] = start[b_key], start[a_key]
    kept = {n: x.dtype for n, x in weights.items()}
    stored = kept if dtype == "keep" else kept | dict.fromkeys(taken, dtype_of(dtype))
    specs = {n: Spec(tuple(x.shape), stored[n]) for n, x in weights.items()}

    def tensor(name: str) -> Tensor:
        if name not in taken:
            return weights[name]
        b, a = taken[name]
        left = torch.addmm(weights[name].float(), b, a, alpha=-1).to(stored[name])
        if not bool(left.isfinite().all()):
            raise CheckpointError(f"{name} does not fit into {dtype}: use --dtype bf16 or fp32")
        return left

    with atomic_folder(output) as new:
        write_tensors(new / RESIDUAL, specs, tensor)
        note = {"base": fingerprint(read_weights(new / RESIDUAL))}
        adapter = SavedAdapter(_set_scale_1(config), values, note)
        write_folder(new / ADAPTER_FOLDER, adapter, output / RESIDUAL)
        write_weights(new / START, make_start_file(start))
    kinds = sorted({str(stored[n]).removeprefix("torch.") for n in taken})
    line = f"wrote {output}: {RESIDUAL}, {ADAPTER_FOLDER} of rank {config.r} on it, {START}"
    if kinds != ["float32"]:
        line += f"; {RESIDUAL} is rounded to {' and '.join(kinds)}, --dtype fp32 rounds nothing"
    return line


def _set_scale_1(config: "LoraConfig") -> "LoraConfig":
    ranks = dict(config.rank_pattern or {})
    return replace(config, lora_alpha=config.r, alpha_pattern=ranks, use_rslora=False)
