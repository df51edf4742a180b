"""Saying before a run what it will do."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from rwkv_peft.data.batching import Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.printing import counted, duration
from rwkv_peft.training.borders import BorderSizes, Room, count_passes, least_room
from rwkv_peft.training.choose import Plan
from rwkv_peft.training.memory import guess_memory
from rwkv_peft.training.settings import Settings


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
    if settings.num_ranks > 1:
        window = settings.accumulate_grad_batches * settings.num_ranks
        yield (
            f"devices: {settings.num_ranks} share the work (--strategy {settings.strategy}), "
            f"{window} micro-batches an optimizer step; memory is that of each"
        )
    elif settings.strategy not in ("auto", "single"):
        yield (
            f"strategy: {settings.strategy} has nothing to share on one device, and changes nothing"
        )


def describe_plan(plan: Plan) -> Iterable[str]:
    """Choices, data and work in lines for a person."""
    settings, batches = plan.settings, plan.batches
    yield from (f"chosen: {c.name} = {c.value} ({c.reason})" for c in plan.choices)
    documents = batches.documents
    split = int((documents.sizes - 1 > settings.ctx_len).sum())
    is_split = split and settings.dataload != "get"
    yield (
        f"data: {counted(len(documents), 'document')}, {counted(documents.num_tokens, 'token')}, "
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
    if settings.chunk_ctx and not settings.is_infctx:
        yield (
            f"rows: --chunk_ctx {settings.chunk_ctx} has no effect, as rows go through the model "
            "whole: --train_type infctx takes them through in chunks"
        )
    micro_batches = counted(plan.micro_batches, "micro-batch", "micro-batches")
    yield (
        f"plan: {counted(settings.epoch_count, 'epoch')} of {micro_batches} of "
        f"{counted(batches.micro_bsz, 'row')}, {counted(plan.steps, 'optimizer step')}"
    )
    if plan.micro_batches < len(batches):
        seen = plan.micro_batches * settings.epoch_count / len(batches)
        yield (
            f"plan: epoch_steps {settings.epoch_steps} stops each epoch early and the next goes on "
            f"there: the run makes {seen:.2f} passes over the data"
        )


def describe_chunks(plan: Plan, model: RWKV, room: Room) -> Iterable[str]:
    """How rows go through the model in chunks, in lines for a person, with memory and time.

    Takes a chunk through the model to know the time.

    Args:
        room: for the states at borders.
    """
    settings, batches = plan.settings, plan.batches
    sizes = batches.draw_rows(0).sizes
    count = -(-int(sizes.max()) // settings.chunk_ctx)
    group = count if settings.bptt_chunks == "all" else min(count, settings.bptt_chunks)
    device = model.emb.weight.device
    borders = BorderSizes(model.model_config, batches.micro_bsz, settings.dtype, device)
    most = max(borders.count(room), least_room(group))
    held, passes = min(group - 1, most), count_passes(group, most) / group
    of_group = "each chunk" if group == 1 else f"each group of {group:,}"
    way = "the row" if group == count else of_group
    yield (
        f"chunks: rows of up to {sizes.max():,} tokens go through in chunks of "
        f"{settings.chunk_ctx:,} ({count:,}), gradients back to the beginning of {way} "
        f"(--bptt_chunks {settings.bptt_chunks})"
    )
    if held > 0:
        taken = borders.take(held, room)
        places = {"the device": taken.device, "the host": taken.host}
        where = " and ".join(
            f"{_amount(size)} on {place}" for place, size in places.items() if size
        )
        yield (
            f"chunks: {held:,} states between chunks are kept at a time, {where}; a chunk goes "
            f"forward {passes:.2g} times"
        )
    if not plan.steps:
        return
    # a product with a frozen weight has one gradient, with a trained one two
    work = passes + (2 if settings.peft == "none" else 1) + (settings.grad_cp > 0)
    share = plan.micro_batches * settings.epoch_count / len(batches)
    seconds = int(sizes.sum()) * share * work * _time_token(model, settings)
    yield f"time: about {duration(seconds)} for {counted(plan.steps, 'optimizer step')} (a guess)"


@torch.no_grad()
def _time_token(model: RWKV, settings: Settings) -> float:
    """Seconds that a token of a chunk takes to go forward."""
    device = model.emb.weight.device
    is_cpu = device.type == "cpu"
    # a CPU is busy with few tokens, and its first call does little more than others
    width = min(settings.chunk_ctx, settings.ctx_len, 128 if is_cpu else settings.chunk_ctx)
    was_training = model.training
    model.eval()
    for length in (16 if is_cpu else width, width):
        tokens = torch.zeros((settings.micro_bsz, length), dtype=torch.int64, device=device)
        started = time.perf_counter()
        model.hidden(tokens)
        if not is_cpu:
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - started
    model.train(was_training)
    return seconds / tokens.numel()


def describe_end(steps: int, resume: str) -> str:
    """What is to be said of a run that is resumed and has nothing left to do."""
    return (
        f"the run is complete: all of its {steps:,} steps are taken. To train on: --resume "
        f"{resume} --epoch_count N --resume_changes epoch_count"
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


def describe_validation(settings: Settings, documents: Documents | None) -> Iterable[str]:
    """What is evaluated and when, in a line for a person."""
    if documents is None:
        return
    every = settings.val_every_steps
    yield (
        f"validation: {counted(len(documents), 'document')}, {documents.num_tokens:,} tokens, "
        f"{documents.num_trained:,} of them counted, before the first step"
        + (f", every {every:,} steps" if every else "")
        + " and at each epoch's end"
    )
    yield from documents.report.describe(documents.paths)


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
            f"warning: {count:,} saves will take about {_amount(needed)}, and {folder} has "
            f"{_amount(free)} free: make room, or save less often (--epoch_save)"
            + (", or the adapter alone (--merge 0)" if is_whole and settings.peft != "none" else "")
        )


def _amount(size: int) -> str:
    name, unit = ("GiB", 2**30) if size >= 2**29 else ("MiB", 2**20)
    return f"{size / unit:,.3g} {name}"
