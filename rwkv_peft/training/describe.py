"""Saying before a run what it will do."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rwkv_peft.data.batching import Batches
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.training.choose import Plan
from rwkv_peft.training.settings import Settings

# vectors (B*T, D) that a block keeps for backward, measured in the compute dtype, and those in
# float32 that the chunked operator keeps
KEPT_VECTORS, KEPT_BY_TORCH = 47, 13


def describe_model(
    settings: Settings, model_config: ModelConfig, op: str, num_weights: int, num_trained: int
) -> Iterable[str]:
    """Model, method and memory in lines for a person."""
    trained = f"{num_trained:,} of them trained"
    if settings.peft != "none":
        trained = f"frozen; {settings.peft} trains {num_trained:,} beside them"
    described = model_config.describe()
    yield f"model: {settings.load_model}, {described}, {num_weights:,} weights, {trained}"
    memory = guess_memory(settings, model_config, op, num_weights, num_trained)
    yield f"memory: about {memory / 2**30:.1f} GiB (a guess)"
    if settings.strategy != "auto":
        yield (
            f"strategy: {settings.strategy} has nothing to share on one device, and changes nothing"
        )


def describe_plan(plan: Plan) -> Iterable[str]:
    """Choices, data and work in lines for a person."""
    settings, batches = plan.settings, plan.batches
    yield from (f"chosen: {c.name} = {c.value} ({c.reason})" for c in plan.choices)
    documents = batches.documents
    split = int((np.diff(documents.starts) - 1 > settings.ctx_len).sum())
    is_split = split and settings.dataload != "get"
    yield (
        f"data: {len(documents):,} documents, {len(documents.tokens):,} tokens, "
        f"{documents.num_trained:,} of them trained in each pass"
        + (f"; {split:,} longer than ctx_len are split" if is_split else "")
    )
    yield from documents.report.describe(documents.paths)
    if settings.epoch_unit == "samples":
        yield f"data: --epoch_unit samples: no document after the first {len(documents):,} is used"
    yield (
        f"rows: {batches.num_rows:,} in a pass, {100 * batches.share_of_tokens():.1f} % of their "
        f"positions hold a token (--dataload {settings.dataload})"
    )
    yield from _describe_shares(batches)
    yield (
        f"plan: {settings.epoch_count} epochs of {plan.micro_batches:,} micro-batches of "
        f"{batches.micro_bsz} rows, {plan.steps:,} optimizer steps"
    )
    if plan.micro_batches < len(batches):
        seen = plan.micro_batches * settings.epoch_count / len(batches)
        yield (
            f"plan: epoch_steps {settings.epoch_steps} stops each epoch early and the next goes on "
            f"there: the run makes {seen:.2f} passes over the data"
        )


def _describe_shares(batches: Batches) -> Iterable[str]:
    """How much of each file of a mixture a pass takes."""
    if batches.documents.shares is None:
        return
    groups, counts = batches.documents.groups, batches.rows_of_pass
    for (name, _), layout, count in zip(groups, batches.layouts, counts, strict=True):
        yield (
            f"mixture: {name} gives {count:,} rows of a pass ({100 * count / batches.num_rows:.1f} "
            f"%), {count / layout.num_rows:.2f} times what it holds"
        )


def describe_space(settings: Settings, folder: Path, num_trained: int) -> Iterable[str]:
    """A warning if what a run will save has no room on the disk of its folder."""
    count = -(-settings.epoch_count // settings.epoch_save)
    is_whole = settings.peft == "none" or (settings.peft != "state" and settings.merge)
    size = Path(settings.load_model).stat().st_size if is_whole else 0
    if settings.peft != "none":
        # adapters and states are float32
        size += num_trained * 4
    needed, free = count * size, shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"warning: {count:,} saves will take about {_gibibytes(needed)}, and {folder} has "
            f"{_gibibytes(free)} free: make room, or save less often (--epoch_save)"
            + (", or the adapter alone (--merge 0)" if is_whole and settings.peft != "none" else "")
        )


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB"


def guess_memory(
    settings: Settings, model_config: ModelConfig, op: str, num_weights: int, num_trained: int
) -> float:
    """Bytes that training may take: weights, what trains them, activations, logits."""
    size, layers = settings.dtype.itemsize, model_config.n_layer
    rows = settings.ctx_len * settings.micro_bsz
    vectors = rows * model_config.n_embd
    kept = vectors * (KEPT_VECTORS * size + (KEPT_BY_TORCH * 4 if op == "torch" else 0))
    activations = kept + vectors * size * layers if settings.grad_cp else kept * layers
    # gradients and moments in float32, and the bits that float32 values have beside 16-bit weights
    training = num_trained * (4 + 8 + (0 if size == 4 else 2))
    logits = min(rows * model_config.vocab_size, 1 << 24) * 12
    return num_weights * size + training + activations + logits
