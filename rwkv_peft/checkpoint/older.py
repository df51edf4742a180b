"""Adapter files of older RWKV-PEFT, a table of tensors with no config, as adapters of today.

LoRA and PiSSA: `M.lora_A` (R, in) and `M.lora_B` (out, R) for a module M, of an R of its own; its
scale is lora_alpha / R. PiSSA subtracts from the base what `init_pissa.pth` holds as
`M.init_lora_A` and `M.init_lora_B`. MiSS, then called Bone and DiSHA: `M.bone` or `M.disha`
(R, out), or (in/R, R, R) in the mode bat. Tensors of the model itself that were trained too have
their own names. Any name may begin with `model.`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rwkv_peft.checkpoint.folder import SavedAdapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods import residual
from rwkv_peft.methods.attach import PREFIX

if TYPE_CHECKING:
    from peft import LoraConfig

# module -> leaf of its names -> tensor
_Modules = dict[str, dict[str, Tensor]]
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<leaf>[AB])")
_BLOCK = re.compile(r"(?P<module>.+)\.(?P<leaf>disha|bone|miss)")
_START = re.compile(r"(?P<module>.+)\.init_lora_(?P<leaf>[AB])")


class LegacyAdapterHints(NamedTuple):
    """What a file of older RWKV-PEFT does not hold.

    Attributes:
        lora_alpha: of the training that wrote it; the scale of a module is lora_alpha / R.
        pissa_init: the file of what PiSSA began with, `init_pissa.pth` of the run.
        lora_dropout: for training further.
    """

    lora_alpha: float | None = None
    pissa_init: str | Path = ""
    lora_dropout: float | None = None


def old_method(path: str | Path) -> str:
    """The method of an adapter file of older RWKV-PEFT, 'lora' or 'miss'; empty for all else."""
    return method_of_names(read_weights(path)) if Path(path).is_file() else ""


def method_of_names(names: Collection[str]) -> str:
    """What `old_method` says, by the names of a file's tensors."""
    for pattern, method in ((_FACTOR, "lora"), (_BLOCK, "miss")):
        if any(pattern.fullmatch(name) for name in names):
            return method
    return ""


def read_old_adapter(path: str | Path, hints: LegacyAdapterHints) -> SavedAdapter:
    """An adapter file of older RWKV-PEFT, in float32 under the names of peft's files.

    PiSSA becomes the LoRA of twice the rank on the original base; see `methods.residual`. Blocks of
    bat that lie along the inputs stay so, as (in/R, 1, R, R).

    Raises:
        CheckpointError: it holds no adapter, or none that has an effect; a tensor lacks its
            partner or has an impossible shape; what it does not hold is not given.
    """
    for name in ("lora_alpha", "lora_dropout"):
        if not isinstance(value := getattr(hints, name), (int, float, NoneType)):
            raise CheckpointError(f"{name}: got {value!r}, allowed is a number")
    tensors = _read_finite(path)
    factors, blocks = _group_by_module(_FACTOR, tensors), _group_by_module(_BLOCK, tensors)
    if bool(factors) == bool(blocks):
        found = "two kinds of adapters" if factors else "no adapter"
        raise CheckpointError(
            f"{path} holds {found}, its first tensor is {next(iter(tensors), 'missing')}: give a "
            "file of lora_A and lora_B, or of disha or bone, or a folder in peft's format"
        )
    taken = {name for name in tensors if _FACTOR.fullmatch(name) or _BLOCK.fullmatch(name)}
    plain = {PREFIX + name: x for name, x in tensors.items() if name not in taken}
    adapter = (_make_lora if factors else _make_miss)(path, factors or blocks, hints)
    if not plain and not _has_effect(factors or blocks, adapter):
        raise CheckpointError(f"{path} changes nothing in the base: it was never trained")
    return adapter._replace(tensors={**adapter.tensors, **plain})


def add_start(path: str | Path, adapter: SavedAdapter, pissa_init: str | Path) -> SavedAdapter:
    """A LoRA on the original base, from an adapter of scale 1 trained on the residual base.

    Args:
        path: of the adapter, for messages.
        pissa_init: the file of what the residual lacks.
    Raises:
        CheckpointError: the two do not belong together.
    """
    from peft import LoraConfig

    config = adapter.config
    if not isinstance(config, LoraConfig) or not _has_scale_1(config):
        raise CheckpointError(f"{path} is no LoRA with a scale of 1: only PiSSA has a pissa_init")
    found = _group_by_module(_START, _read_finite(pissa_init))
    start = {
        f"{PREFIX}{module}.lora_{leaf}.weight": x
        for module, leaves in found.items()
        for leaf, x in leaves.items()
    }
    wanted = {n: tuple(x.shape) for n, x in adapter.tensors.items() if ".lora_" in n}
    shapes = {n: tuple(x.shape) for n, x in start.items()}
    if shapes != wanted:
        name = min(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise CheckpointError(
            f"{pissa_init} does not belong to {path}: {name.removeprefix(PREFIX)} is "
            f"{shapes.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the "
            "adapter: give the init_pissa.pth of the same run"
        )
    values = {n: x.float() for n, x in adapter.tensors.items()}
    joined = residual.join_start(values, start)
    note = {"init": "pissa"}
    return SavedAdapter(residual.with_rank(config, 2), joined, note)


def make_start_file(start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an `init_pissa.pth` from first values by the names of peft's files."""
    return {
        n.removeprefix(PREFIX).removesuffix(".weight").replace(".lora_", ".init_lora_"): x
        for n, x in start.items()
    }


def _read_finite(path: str | Path) -> dict[str, Tensor]:
    found = read_weights(path)
    for name, x in found.items():
        if not x.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {str(x.dtype).removeprefix('torch.')}, and adapters hold "
                "float32, float16 or bfloat16: save it again as one of them"
            )
    tensors = {n.removeprefix("model."): x.float() for n, x in found.items()}
    for name, x in tensors.items():
        if not bool(x.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    return tensors


def _group_by_module(pattern: re.Pattern[str], tensors: Mapping[str, Tensor]) -> _Modules:
    found: _Modules = {}
    for name, x in tensors.items():
        if match := pattern.fullmatch(name):
            found.setdefault(match["module"], {})[match["leaf"]] = x
    return found


def _has_scale_1(config: "LoraConfig") -> bool:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    return config.lora_alpha == config.r and ranks == alphas and not config.use_rslora


def _has_effect(modules: _Modules, adapter: SavedAdapter) -> bool:
    if adapter.note.get("init"):
        values, start = residual.split_start(adapter.tensors)
        return any(not values[n].equal(x) for n, x in start.items())
    return any(all(bool(x.any()) for x in leaves.values()) for leaves in modules.values())


def _make_lora(path: str | Path, factors: _Modules, hints: LegacyAdapterHints) -> SavedAdapter:
    from peft import LoraConfig

    ranks = _find_ranks(path, factors)
    rank = max(ranks.values())
    patterns = {re.escape(module): r for module, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=_choose_alpha(path, rank, hints),
        lora_dropout=hints.lora_dropout or 0.0,
        target_modules=name_targets(factors),
        rank_pattern=patterns,
        # PiSSA has a scale of 1 at every rank
        alpha_pattern=patterns if hints.pissa_init else {},
    )
    tensors = {
        f"{PREFIX}{module}.lora_{leaf}.weight": x
        for module, leaves in factors.items()
        for leaf, x in sorted(leaves.items())
    }
    adapter = SavedAdapter(config, tensors, {})
    return add_start(path, adapter, hints.pissa_init) if hints.pissa_init else adapter


def _find_ranks(path: str | Path, factors: _Modules) -> dict[str, int]:
    ranks = {}
    for module, leaves in factors.items():
        a, b = leaves.get("A"), leaves.get("B")
        if a is None or b is None:
            lacks = "lora_A" if a is None else "lora_B"
            raise CheckpointError(f"{path} is incomplete: {module}.{lacks} is missing")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
            raise CheckpointError(
                f"{path}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, which "
                "are no (R, in) and (out, R)"
            )
        ranks[module] = len(a)
    return ranks


def _choose_alpha(path: str | Path, rank: int, hints: LegacyAdapterHints) -> float:
    alpha = hints.lora_alpha
    if hints.pissa_init:
        if alpha not in (None, rank):
            raise CheckpointError(f"--lora_alpha {alpha}: PiSSA has a scale of 1, leave it out")
        return rank
    if alpha is None:
        raise CheckpointError(
            f"{path} holds a LoRA of rank {rank} and not how it is scaled: give --lora_alpha of "
            "its training (32 unless it was set), or for PiSSA --pissa_init with its init_pissa.pth"
        )
    if alpha <= 0:
        raise CheckpointError(f"--lora_alpha must be above 0, got {alpha}")
    return alpha


def _make_miss(path: str | Path, modules: _Modules, hints: LegacyAdapterHints) -> SavedAdapter:
    from peft import MissConfig

    for name in ("lora_alpha", "pissa_init"):
        if getattr(hints, name):
            raise CheckpointError(f"{path} holds MiSS, which has no {name}: leave --{name} out")
    blocks = {module: x for module, leaves in modules.items() for x in leaves.values()}
    sizes = {(x.ndim, *(x.shape[1:] if x.ndim == 3 else x.shape[:1])) for x in blocks.values()}
    ndim, *sides = sizes.pop()
    if sizes or ndim not in (2, 3) or sides[0] != sides[-1]:
        shapes = sorted({tuple(x.shape) for x in blocks.values()})
        raise CheckpointError(
            f"{path} holds blocks of the shapes {shapes[:6]}, which are neither all (R, out) nor "
            "all (in/R, R, R) of one R"
        )
    if ndim == 3 and not _lie_along_outputs(blocks):
        blocks = {module: x.unsqueeze(1) for module, x in blocks.items()}
    config = MissConfig(
        r=sides[0],
        init_weights="bat" if ndim == 3 else True,
        miss_dropout=hints.lora_dropout or 0.0,
        target_modules=name_targets(blocks),
    )
    tensors = {f"{PREFIX}{module}.miss_block": x for module, x in blocks.items()}
    return SavedAdapter(config, tensors, {})


def _lie_along_outputs(blocks: Mapping[str, Tensor]) -> bool:
    """Whether bat has a block for each R outputs of a matrix, as in peft.

    Older RWKV-PEFT had one for each R inputs from its first release on. ffn.key tells them apart,
    which has more outputs than inputs; square matrices alone do not.
    """
    keys = [len(x) for module, x in blocks.items() if module.endswith("ffn.key")]
    return any(count > min(map(len, blocks.values())) for count in keys)


def name_targets(modules: Iterable[str]) -> list[str]:
    """The target modules that a file of these stands for.

    Endings, if the first layers have the same ones: a file of fewer layers than the model has is
    then not taken for one of the model. Full names in all other cases.
    """
    names = set(modules)
    parts = [name.split(".", 2) for name in names]
    layers = {p[1] for p in parts if len(p) == 3}
    endings = {p[2] for p in parts if len(p) == 3}
    first = {str(i) for i in range(len(layers))}
    same = {f"blocks.{i}.{ending}" for i in first for ending in endings}
    return sorted(endings if same == names else names)
