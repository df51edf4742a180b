"""Choosing what the user left open, and saying before the run what it will do."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import randbelow
from typing import Any

import numpy as np

from rwkv_peft.checkpoint.adapter import saved_method
from rwkv_peft.config import UNSAVED, TrainConfig
from rwkv_peft.data.batching import Batches
from rwkv_peft.data.prepare import Documents
from rwkv_peft.device import choose_precision, dtype_of, resolve_device
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.catalog import canonical
from rwkv_peft.models.config import ModelConfig

# longest row chosen without being asked: what recent official files were trained on
MAX_CHOSEN_CTX = 4096
# tokens of a micro-batch aimed at; more keeps a GPU busier but costs memory
TOKENS_PER_MICRO_BATCH = 1024
PACKED = "documents share rows, each with a state of its own, so that next to nothing is padding"
# below so many documents one pass is seldom enough
SMALL_SET = 1000
LORA_DEFAULTS = {"r": 32, "lora_alpha": 32}
STATE_RATE = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    """A value chosen for a field, and why."""

    name: str
    value: Any
    reason: str


def choose_model_settings(config: TrainConfig) -> tuple[TrainConfig, list[Choice]]:
    """Fills in what must be known to load the model: folder, device, precision, method, seed."""
    given, config, choices = config, _with_canonical_method(config), []
    if not config.proj_dir:
        choices.append(Choice("proj_dir", free_folder("out"), "the first free name"))
    device = resolve_device(config.accelerator)
    if config.accelerator == "auto":
        choices.append(Choice("accelerator", str(device), "found on this machine"))
    if config.precision == "auto":
        choices.append(Choice("precision", *choose_precision(device)))
    if config.template == "auto":
        name = config.template_name
        reason = "RWKV's own dialogues" if name == "chat" else "as sft data always was"
        choices.append(Choice("template", name, reason))
    if given.peft == "auto" and config.load_adapter:
        choices.append(Choice("peft", config.peft, "the method of load_adapter"))
    elif config.peft == "auto":
        choices.append(Choice("peft", "lora", "needs little memory and gives small files"))
        if not config.peft_config:
            reason = "a rank that suits most tasks, at a scale of 1"
            choices.append(Choice("peft_config", dict(LORA_DEFAULTS), reason))
    if config.random_seed < 0:
        choices.append(Choice("random_seed", randbelow(2**31), "drawn; give it to repeat the run"))
    return replace(config, **{c.name: c.value for c in choices}), choices


def _with_canonical_method(config: TrainConfig) -> TrainConfig:
    """The method under today's name, the parts of its options where they belong."""
    given = {"load": config.load_adapter} if config.load_adapter else {}
    method, options = canonical(config.peft, config.peft_config | given)
    if load := options.pop("load", ""):
        # a folder brings its own options, however an old line named it
        asks = Path(load).is_file() or config.load_adapter
        options = {k: v for k, v in options.items() if k in UNSAVED and asks}
    parts = [*config.train_parts, *options.pop("train_parts", ())]
    if load:
        saved = saved_method(load)
        if method not in ("auto", saved):
            raise ConfigError(f"--peft {config.peft}: {load} holds {saved}; leave --peft out")
        method = saved
    train_type = config.train_type
    if train_type != "none" and method in ("auto", "none"):
        method = "state"
    if method == "state" and train_type == "none":
        train_type = "state"
    if train_type != "none" and (method != "state" or parts):
        what = f"--peft {method}" if method != "state" else "--train_parts"
        raise ConfigError(f"--train_type {train_type} trains the state alone: leave out {what}")
    return replace(
        config,
        peft=method,
        peft_config=options,
        load_adapter=load,
        train_parts=parts,
        train_type=train_type,
    )


def choose_training_settings(
    config: TrainConfig, model_config: ModelConfig, documents: Documents
) -> tuple[TrainConfig, list[Choice]]:
    """Fills in what depends on the model and the data."""
    config, choices = _choose_rows(config, documents)

    def choose(name: str, value: object, reason: str) -> None:
        if getattr(config, name) is None:
            choices.append(Choice(name, value, reason))

    assert config.ctx_len is not None and config.micro_bsz is not None
    few = len(documents) < SMALL_SET
    reason = f"{len(documents)} documents are {'few' if few else 'enough'}"
    choose("epoch_count", 3 if few else 1, reason)
    if config.peft == "none":
        lr, reason = 3e-5 * math.sqrt(768 / model_config.n_embd), "full tuning at this width"
    elif config.peft == "state":
        lr, reason = STATE_RATE, "a state has far to go from zero"
    else:
        lr, reason = 2e-4, "usual for adapters"
    lr = config.lr_init or float(f"{lr:.1g}")
    choose("lr_init", lr, reason)
    choose("lr_final", lr / 10, "a tenth of lr_init")
    is_deep = config.ctx_len * config.micro_bsz * model_config.n_layer * model_config.n_embd > 2**24
    choose("grad_cp", int(is_deep), "saves memory" if is_deep else "the batch is small")
    return replace(config, **{c.name: c.value for c in choices}), choices


def _choose_rows(config: TrainConfig, documents: Documents) -> tuple[TrainConfig, list[Choice]]:
    """Fills in how documents become rows, and the size of a micro-batch."""
    choices = []
    dataload: str = config.dataload
    if dataload == "auto":
        dataload, reason = "pack", PACKED
        if config.peft == "state":
            dataload, reason = "pad", "the first document of a row alone begins with its state"
        choices.append(Choice("dataload", dataload, reason))
    elif dataload in ("pack", "get") and config.peft == "state":
        raise ConfigError(
            f"--dataload {dataload} cannot train states: only the first document of a row would "
            "begin with its state; use --dataload pad"
        )
    longest, is_static = documents.longest, dataload in ("pack", "get")
    # short documents fill a row of many better than one of few
    wanted = max(longest, min(TOKENS_PER_MICRO_BATCH, documents.num_targets) if is_static else 0)
    ctx_len = config.ctx_len or min(MAX_CHOSEN_CTX, max(16, math.ceil(wanted / 16) * 16))
    if config.ctx_len is None:
        choices.append(Choice("ctx_len", ctx_len, f"the longest document has {longest} tokens"))
    typical = max(1, min(ctx_len, documents.num_targets // len(documents)))
    micro_bsz, reason = TOKENS_PER_MICRO_BATCH // typical, f"a document has {typical} tokens"
    if is_static:
        micro_bsz, reason = TOKENS_PER_MICRO_BATCH // ctx_len, f"rows are full, of {ctx_len} tokens"
    if dataload == "only":
        micro_bsz, reason = 1, "--dataload only has one row a micro-batch"
    if config.micro_bsz is None:
        choices.append(Choice("micro_bsz", max(1, min(8, micro_bsz)), reason))
    return replace(config, **{c.name: c.value for c in choices}), choices


def make_batches(config: TrainConfig, documents: Documents) -> Batches:
    """The micro-batches of a run whose settings are all chosen."""
    assert config.dataload != "auto"
    assert config.ctx_len is not None and config.micro_bsz is not None
    return Batches(
        documents,
        dataload=config.dataload,
        ctx_len=config.ctx_len,
        micro_bsz=config.micro_bsz,
        seed=config.random_seed,
        is_shuffled=bool(config.data_shuffle),
        accumulate=config.accumulate_grad_batches,
    )


def choose_warmup(config: TrainConfig, steps: int) -> tuple[TrainConfig, list[Choice]]:
    """Fills in the warm-up once the number of steps is known."""
    if config.warmup_steps is not None:
        return config, []
    warmup = Choice("warmup_steps", min(100, steps // 20), "a twentieth of the steps")
    return replace(config, warmup_steps=warmup.value), [warmup]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        micro_batches: of one epoch.
        steps: optimizer steps of all epochs.
    """

    micro_batches: int
    steps: int


def make_plan(config: TrainConfig, batches: Batches) -> Plan:
    """Counts the work of a run whose settings are all chosen."""
    assert config.epoch_count is not None
    micro_batches = len(batches)
    if config.epoch_steps and config.epoch_unit == "steps":
        micro_batches = min(micro_batches, config.epoch_steps)
    per_epoch = -(-micro_batches // config.accumulate_grad_batches)
    return Plan(micro_batches, per_epoch * config.epoch_count)


def describe_model(
    config: TrainConfig, model_config: ModelConfig, op: str, num_weights: int, num_trained: int
) -> Iterable[str]:
    """Model, method and memory in lines for a person."""
    trained = f"{num_trained:,} of them trained"
    if config.peft != "none":
        trained = f"frozen; {config.peft} trains {num_trained:,} beside them"
    described = model_config.describe()
    yield f"model: {config.load_model}, {described}, {num_weights:,} weights, {trained}"
    memory = guess_memory(config, model_config, op, num_weights, num_trained)
    yield f"memory: about {memory / 2**30:.1f} GiB (a guess)"
    if config.strategy != "auto":
        yield f"strategy: {config.strategy} has nothing to share on one device, and changes nothing"


def describe_plan(config: TrainConfig, plan: Plan, batches: Batches) -> Iterable[str]:
    """Data and work in lines for a person."""
    documents = batches.documents
    assert config.epoch_count is not None and config.ctx_len is not None
    split = int((np.diff(documents.starts) - 1 > config.ctx_len).sum())
    yield (
        f"data: {len(documents):,} documents, {len(documents.tokens):,} tokens, "
        f"{documents.num_trained:,} of them trained in each pass"
        + (
            f"; {split:,} longer than ctx_len are split"
            if split and config.dataload != "get"
            else ""
        )
    )
    yield from documents.report.describe(documents.paths)
    if config.epoch_unit == "samples":
        yield f"data: --epoch_unit samples: no document after the first {len(documents):,} is used"
    yield (
        f"rows: {batches.num_rows:,} in a pass, {100 * batches.share_of_tokens():.1f} % of their "
        f"positions hold a token (--dataload {config.dataload})"
    )
    yield from _describe_shares(batches)
    yield (
        f"plan: {config.epoch_count} epochs of {plan.micro_batches:,} micro-batches of "
        f"{batches.micro_bsz} rows, {plan.steps:,} optimizer steps"
    )
    if plan.micro_batches < len(batches):
        seen = plan.micro_batches * config.epoch_count / len(batches)
        yield (
            f"plan: epoch_steps {config.epoch_steps} stops each epoch early and the next goes on "
            f"there: the run makes {seen:.2f} passes over the data"
        )


def _describe_shares(batches: Batches) -> Iterable[str]:
    """How much of each file of a mixture a pass takes."""
    if batches.documents.shares is None:
        return
    names, counts = batches.documents.paths, batches.rows_of_pass
    for path, layout, count in zip(names, batches.layouts, counts, strict=True):
        yield (
            f"mixture: {path} gives {count:,} rows of a pass ({100 * count / batches.num_rows:.1f} "
            f"%), {count / layout.num_rows:.2f} times what it holds"
        )


def guess_memory(
    config: TrainConfig, model_config: ModelConfig, op: str, num_weights: int, num_trained: int
) -> float:
    """Bytes that training may take: weights, what trains them, activations, logits."""
    assert config.ctx_len is not None and config.micro_bsz is not None
    size = dtype_of(config.precision).itemsize
    rows = config.ctx_len * config.micro_bsz
    # vectors of D that a block keeps for backward, and those that the chunked operator does
    kept = rows * model_config.n_embd * (47 * size + (13 * 4 if op == "torch" else 0))
    layers = model_config.n_layer
    activations = (
        kept + rows * model_config.n_embd * size * layers if config.grad_cp else kept * layers
    )
    # gradients and moments in float32, and what float32 values have more than 16-bit weights
    training = num_trained * (4 + 8 + (0 if size == 4 else 2))
    logits = min(rows * model_config.vocab_size, 1 << 24) * 12
    return num_weights * size + training + activations + logits


def free_folder(stem: str) -> str:
    """The first of stem, stem-2, stem-3 … that does not exist."""
    number, folder = 1, stem
    while Path(folder).exists():
        number += 1
        folder = f"{stem}-{number}"
    return folder
