"""Choosing what the user left open, once, when all that the choices depend on is known."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from secrets import randbelow
from typing import Any, NamedTuple

from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.device import (
    choose_precision,
    dtype_of,
    fp8_objection,
    free_host_memory,
    has_graphs,
    has_host_memory,
    missing_compiler,
)
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.catalog import resolve
from rwkv_peft.methods.stored import require_served
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.parallel.strategy import require_strategy
from rwkv_peft.printing import counted
from rwkv_peft.training.defaults import (
    add_options,
    choose_last_rate,
    choose_rate,
    choose_warmup,
    longest_chosen,
)
from rwkv_peft.training.memory import fits, positions_at_once, weigh_base
from rwkv_peft.training.settings import Choice, Facts, Settings

# tokens of a micro-batch aimed at; more keeps a GPU busier but costs memory
TOKENS_PER_MICRO_BATCH = 1024
PACKED = "documents share rows, each with a state of its own, so that next to nothing is padding"
# with fewer documents one pass is seldom enough
SMALL_SET = 1000
# of the host's memory, in tokens, targets, weights and segment ids
BYTES_OF_POSITION = 24
# methods whose captured steps were compared with plain ones on a GPU
CAPTURED = ("none", "state", "lora", "pissa", "miss")
# weights times positions from which compiling, which takes some 20 seconds, saves more than that
LONG_RUN = 1e15
# of what is free on a device, that a base may take and leave room to train
SHARE_OF_BASE = 0.6
# tokens of a chunk whose gradient ends with it, as of old, and of one whose gradient does not,
# the largest first
TRUNCATED_CHUNK, EXACT_CHUNKS = 512, (4096, 2048, 1024, 512)


class Plan(NamedTuple):
    """What a run will do.

    Attributes:
        settings: in which nothing is left open.
        choices: what was chosen for it, in the order of choosing.
        batches: all micro-batches.
        micro_batches: of one epoch.
        window: micro-batches of an optimizer step, of all ranks together.
        steps: optimizer steps of all epochs.
    """

    settings: Settings
    choices: list[Choice]
    batches: Batches
    micro_batches: int
    window: int
    steps: int


def choose(config: TrainConfig, facts: Facts) -> Plan:
    """Settings from what the user said and what is known; what was said is never changed.

    Raises:
        ConfigError: settings contradict each other or the facts.
        DataError: the documents give no row.
    """
    chooser = _Chooser(with_method(config, facts.saved_method))
    _choose_run(chooser, facts, is_open=config.peft == "auto")
    is_left_open = not (config.peft_config or config.load_adapter or config.peft == "auto")
    if is_left_open and (options := chooser.values["peft_config"]):
        chooser.set("peft_config", options, "what suits most tasks with this method")
    if chooser.values["quant_head"] and chooser.values["quant"] == "none":
        raise ConfigError("--quant_head 1 stores the head as --quant says: give --quant too")
    if chooser.values["quant"] != "none":
        require_served(chooser.values["peft"], chooser.values["peft_config"])
    if chooser.values["quant"] == "fp8":
        _require_fp8(chooser.values["precision"], facts)
    _choose_rows(chooser, facts)
    _choose_training(chooser, facts.documents, facts.model_config)
    _choose_memory(chooser, facts)
    batches = make_batches(chooser.values, facts.documents)
    _require_room(batches)
    micro_batches, steps = count_steps(chooser.values, len(batches))
    chooser.choose("warmup_steps", *choose_warmup(steps))
    positions = micro_batches * chooser.values["epoch_count"] * batches.positions
    _choose_step(chooser, facts, positions)
    window = window_of(chooser.values)
    return Plan(Settings(**chooser.values), chooser.choices, batches, micro_batches, window, steps)


def _require_fp8(precision: str, facts: Facts) -> None:
    """Raises ConfigError if a device has no products of FP8, or they do not give a precision."""
    if why := fp8_objection(facts.device):
        raise ConfigError(
            f"--quant fp8 needs a card that multiplies FP8, and {why}: use int8, which takes half "
            "the memory, or none"
        )
    if precision != "bf16":
        raise ConfigError(f"--quant fp8 gives bf16, and --precision is {precision}: use bf16")


def _require_room(batches: Batches) -> None:
    """Raises ConfigError if a micro-batch of full rows has no room on this machine."""
    free = free_host_memory()
    if batches.is_static and free is not None and batches.positions * BYTES_OF_POSITION > free:
        raise ConfigError(
            f"--ctx_len {batches.ctx_len} with --micro_bsz {batches.micro_bsz}: a micro-batch of "
            f"{batches.positions:,} positions does not fit into this machine: use smaller ones, or "
            "--dataload pad"
        )


def make_batches(values: dict[str, Any], documents: Documents) -> Batches:
    """The micro-batches of settings by their names."""
    return Batches(
        documents,
        dataload=values["dataload"],
        ctx_len=values["ctx_len"],
        micro_bsz=values["micro_bsz"],
        seed=values["random_seed"],
        is_shuffled=bool(values["data_shuffle"]),
        accumulate=window_of(values),
    )


def window_of(values: dict[str, Any]) -> int:
    """Micro-batches of an optimizer step: each rank has as many as are accumulated."""
    return int(values["accumulate_grad_batches"] * values["devices"] * values["num_nodes"])


def count_steps(values: dict[str, Any], micro_batches: int) -> tuple[int, int]:
    """Micro-batches of an epoch and optimizer steps of all epochs, of so many in a pass."""
    if values["epoch_steps"] and values["epoch_unit"] == "steps":
        micro_batches = min(micro_batches, values["epoch_steps"])
    steps = -(-micro_batches // window_of(values))
    return micro_batches, steps * values["epoch_count"]


class _Chooser:
    """Values by name, those that were left open filled in one after the other."""

    def __init__(self, config: TrainConfig) -> None:
        self.values = {f.name: getattr(config, f.name) for f in fields(config)}
        self.choices: list[Choice] = []

    def choose(self, name: str, value: object, reason: str) -> None:
        """Takes a value for a field, unless the user gave one."""
        if self.values[name] in (None, "", "auto"):
            self.set(name, value, reason)

    def set(self, name: str, value: object, reason: str) -> None:
        """Takes a value for a field."""
        self.values[name] = value
        self.choices.append(Choice(name, value, reason))


def with_method(config: TrainConfig, saved_method: str) -> TrainConfig:
    """The method under its name in peft, and the kind of training that goes with it.

    Args:
        saved_method: of the adapter or state to train further; "" if there is none.
    """
    method, options = resolve(config.peft, config.peft_config)
    if config.load_adapter:
        if method not in ("auto", saved_method):
            raise ConfigError(
                f"--peft {config.peft}: {config.load_adapter} holds {saved_method}; leave "
                "--peft out"
            )
        method, options = saved_method, dict(config.peft_config)
    elif not config.peft_config:
        options = add_options(method, options)
    train_type = config.train_type
    if train_type in ("state", "fullstate") and method in ("auto", "none"):
        method = "state"
    if method == "state" and train_type == "none":
        train_type = "state"
    if train_type in ("state", "fullstate") and (method != "state" or config.train_parts):
        what = f"--peft {method}" if method != "state" else "--train_parts"
        raise ConfigError(f"--train_type {train_type} trains the state alone: leave out {what}")
    return replace(config, peft=method, peft_config=options, train_type=train_type)


def _choose_run(chooser: _Chooser, facts: Facts, *, is_open: bool) -> None:
    """Folder, device, dtype, template, method and seed."""
    values = chooser.values
    chooser.choose("proj_dir", facts.free_folder, "the first free name")
    chooser.choose("accelerator", str(facts.device), "found on this machine")
    chooser.choose("precision", *choose_precision(facts.device))
    is_sft = values["data_type"] == "sft"
    reason = "as sft data always was" if is_sft else "RWKV's own dialogues"
    chooser.choose("template", "alpaca" if is_sft else "chat", reason)
    if is_open and values["load_adapter"]:
        chooser.set("peft", values["peft"], "the method of load_adapter")
    elif values["peft"] == "auto":
        chooser.choose("peft", "lora", "needs little memory and gives small files")
        if not values["peft_config"]:
            reason = "a rank that suits most tasks, at a scale of 1"
            chooser.set("peft_config", add_options("lora", {}), reason)
    _choose_strategy(chooser, facts)
    if values["random_seed"] < 0:
        chooser.set("random_seed", randbelow(2**31), "drawn; give it to repeat the run")


def _choose_strategy(chooser: _Chooser, facts: Facts) -> None:
    """How devices share the work."""
    values = chooser.values
    count = values["devices"] * values["num_nodes"]
    if count == 1:
        return
    chooser.choose("strategy", *_suit_strategy(values, facts))
    require_strategy(values["strategy"], count)
    if values["strategy"] != "fsdp":
        return
    refused = {
        "--peft none": values["peft"] == "none",
        "--train_parts": values["train_parts"],
        "--train_type infctx and --bptt_chunks": _is_infctx(values),
        "--val_prompts": values["val_prompts"],
        "--compile 1": values["compile"] == 1,
        "--cuda_graph 1": values["cuda_graph"] == 1,
    }
    if found := [name for name, is_asked in refused.items() if is_asked]:
        raise ConfigError(
            f"--strategy fsdp shares the frozen blocks of whole rows, and not with {found[0]} so "
            "far: use --strategy ddp, or leave that out"
        )


def _suit_strategy(values: dict[str, Any], facts: Facts) -> tuple[str, str]:
    """The strategy for what fits a device, and why."""
    weights = weigh_base(
        facts.model_config,
        facts.num_weights,
        dtype_of(values["precision"]).itemsize,
        values["quant"],
    )
    free, says = facts.memory, f"the model takes {weights / 2**30:.1f} GiB of each device"
    if free is None or weights <= SHARE_OF_BASE * free:
        return "ddp", says
    says += f" and leaves too little of {free / 2**30:.1f} GiB"
    if values["peft"] == "none" or _is_infctx(values):
        return "ddp", f"{says}, but fsdp serves frozen blocks and whole rows alone so far"
    return "fsdp", says


def _choose_rows(chooser: _Chooser, facts: Facts) -> None:
    """How documents become rows, and the size of a micro-batch."""
    values, documents = chooser.values, facts.documents
    is_state = values["peft"] == "state"
    if is_state and values["dataload"] in ("pack", "get"):
        raise ConfigError(
            f"--dataload {values['dataload']} cannot train states: only the first document of a "
            "row would begin with its state; use --dataload pad"
        )
    if is_state:
        reason = "the first document of a row alone begins with its state"
        chooser.choose("dataload", "pad", reason)
    chooser.choose("dataload", "pack", PACKED)
    longest, is_static = documents.longest, values["dataload"] in ("pack", "get")
    # short documents fill a row of many better than one of few
    wanted = max(longest, min(TOKENS_PER_MICRO_BATCH, documents.num_targets) if is_static else 0)
    wanted = max(16, math.ceil(wanted / 16) * 16)
    if not _is_infctx(values):
        wanted = min(longest_chosen(values, facts), wanted)
    reason = f"the longest document has {counted(longest, 'token')}"
    if wanted < longest:
        reason += ", and is split; --train_type infctx takes rows of any length"
    chooser.choose("ctx_len", wanted, reason)
    ctx_len = values["ctx_len"]
    typical = max(1, min(ctx_len, documents.num_targets // len(documents)))
    micro_bsz, reason = (
        TOKENS_PER_MICRO_BATCH // typical,
        f"a document has {counted(typical, 'token')}",
    )
    if is_static:
        micro_bsz, reason = TOKENS_PER_MICRO_BATCH // ctx_len, f"rows are full, of {ctx_len} tokens"
    if values["dataload"] == "only":
        micro_bsz, reason = 1, "--dataload only has one row a micro-batch"
    chooser.choose("micro_bsz", max(1, min(8, micro_bsz)), reason)


def _choose_training(chooser: _Chooser, documents: Documents, model_config: ModelConfig) -> None:
    """Epochs and rates."""
    values = chooser.values
    few = len(documents) < SMALL_SET
    reason = f"{counted(len(documents), 'document')}, {'which are few' if few else 'which suffice'}"
    chooser.choose("epoch_count", 3 if few else 1, reason)
    chooser.choose("lr_init", *choose_rate(values, model_config))
    chooser.choose("lr_final", *choose_last_rate(values))


def _is_infctx(values: dict[str, Any]) -> bool:
    return bool(values["train_type"] == "infctx" or values["bptt_chunks"])


def _choose_memory(chooser: _Chooser, facts: Facts) -> None:
    """Chunks, and recomputing."""
    values = chooser.values
    if _is_infctx(values):
        _choose_chunks(chooser, facts)
    is_deep = not _chunk_fits(values, facts, values["chunk_ctx"] if _is_infctx(values) else 0)
    what = "a chunk" if _is_infctx(values) else "a micro-batch"
    reason = f"{what} would not fit otherwise" if is_deep else f"{what} fits without"
    chooser.choose("grad_cp", int(is_deep), reason)
    _choose_embedding(chooser, facts)


def _choose_embedding(chooser: _Chooser, facts: Facts) -> None:
    """Whether the embedding stays on the host.

    Raises:
        ConfigError: it cannot, and that was asked for.
    """
    values = chooser.values
    can_be, is_trained = has_host_memory(facts.device), trains_embedding(values)
    if values["emb_cpu"] and (not can_be or is_trained):
        why = (
            "the embedding is trained"
            if is_trained
            else f"{facts.device.type} cannot read the host's memory by itself"
        )
        raise ConfigError(f"--emb_cpu 1: {why}: give 0")
    chunk_ctx = values["chunk_ctx"] if _is_infctx(values) else 0
    is_short = can_be and not is_trained and not _chunk_fits(values, facts, chunk_ctx)
    reason = "memory is short" if is_short else "there is room on the device"
    chooser.choose("emb_cpu", int(is_short), "there is nothing to leave" if is_trained else reason)


def trains_embedding(values: Mapping[str, Any]) -> bool:
    """Whether the embedding itself is trained, or replaced by what is."""
    replaced = values["peft_config"].get("modules_to_save") or ()
    return (
        values["peft"] == "none"
        or any(part in "emb.weight" for part in values["train_parts"])
        or any(str(name).endswith("emb") for name in replaced)
    )


def _choose_step(chooser: _Chooser, facts: Facts, positions: int) -> None:
    """Whether blocks are compiled, and steps captured.

    Args:
        positions: of all rows of the run.
    Raises:
        ConfigError: what was asked for cannot be had.
    """
    values, missing = chooser.values, missing_compiler(facts.device)
    if missing and values["compile"] == 1:
        raise ConfigError(f"--compile 1 needs {missing}: install it, or give --compile 0")
    if values["cuda_graph"] == 1 and not has_graphs(facts.device):
        raise ConfigError(f"--cuda_graph 1 is not for {facts.device.type}: give --cuda_graph 0")
    is_long = facts.num_weights * positions >= LONG_RUN
    shares = values["strategy"] == "fsdp" and values["devices"] * values["num_nodes"] > 1
    if facts.device.type == "cpu":
        compiles, reason = False, "on a CPU it seldom pays"
    elif shares:
        compiles, reason = False, "blocks that are gathered were not compiled so far"
    elif missing:
        compiles, reason = False, f"the blocks would be faster compiled, which needs {missing}"
    elif values["dataload"] == "pad" and not _is_infctx(values):
        compiles, reason = False, "rows of each length would have to be compiled"
    else:
        compiles, reason = (
            is_long,
            "the run is long" if is_long else "the run is short",
        )
    chooser.choose("compile", int(compiles), reason)
    captures = has_graphs(facts.device)
    reason = "the host would hold up the device" if captures else "there is nothing to capture"
    if captures and values["peft"] not in CAPTURED:
        captures, reason = False, f"{values['peft']} was not measured so: 1 asks for it"
    if captures and shares:
        captures, reason = False, "blocks are gathered while a step goes on"
    chooser.choose("cuda_graph", int(captures), reason)


def _choose_chunks(chooser: _Chooser, facts: Facts) -> None:
    """How long chunks are, and over how many a gradient goes."""
    values = chooser.values
    if not values["bptt_chunks"]:
        is_state = values["peft"] == "state"
        reason = "a gradient ends with its chunk, as of old; all is exact"
        if is_state:
            reason = "a state learns what a gradient brings to the beginning of the row"
        chooser.set("bptt_chunks", "all" if is_state else 1, reason)
    if values["chunk_ctx"]:
        return
    if values["bptt_chunks"] != "all":
        chooser.set("chunk_ctx", TRUNCATED_CHUNK, "as of old")
        return
    useful = [n for n in EXACT_CHUNKS if n // 2 < values["ctx_len"]] or [EXACT_CHUNKS[-1]]
    fitting = [n for n in useful if _chunk_fits(values, facts, n)]
    reason = "the longest that fits" if fitting else "the shortest, and yet it may not fit"
    chooser.set("chunk_ctx", (fitting or useful[-1:])[0], reason)


def _chunk_fits(values: dict[str, Any], facts: Facts, chunk_ctx: int) -> bool:
    """Whether chunks of so many tokens fit into the device, recomputed only if that was asked."""
    is_full = values["peft"] == "none"
    return fits(
        facts,
        dtype_of(values["precision"]),
        op=values["op"],
        positions=values["micro_bsz"] * positions_at_once(values["ctx_len"], chunk_ctx),
        trains_all=is_full,
        is_recomputed=bool(values["grad_cp"]),
        quant=values["quant"],
        has_head=bool(values["quant_head"]),
    )
