"""Choices that the device decides: sharing, recomputing, chunks, compiling, graphs, the host."""

from collections.abc import Mapping
from typing import Any

from rwkv_peft.device import (
    dtype_of,
    fp8_objection,
    has_graphs,
    has_host_memory,
    missing_compiler,
)
from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.strategy import stage_of
from rwkv_peft.training.chooser import Chooser
from rwkv_peft.training.memory import (
    USABLE,
    fits,
    guess_trained,
    has_room_on_host,
    positions_at_once,
)
from rwkv_peft.training.settings import Facts
from rwkv_peft.training.sharing import require_shareable, suit_strategy

# methods whose captured steps were compared with plain ones on a GPU
CAPTURED = ("none", "state", "lora", "pissa", "miss")
# weights times positions from which compiling, which takes some 20 seconds, saves more than that
LONG_RUN = 1e15
# tokens of a chunk whose gradient ends with it, as of old, and of one whose gradient does not,
# the largest first
TRUNCATED_CHUNK, EXACT_CHUNKS = 512, (4096, 2048, 1024, 512)


def choose_strategy(chooser: Chooser, facts: Facts) -> None:
    """How devices share the work."""
    values = chooser.values
    count = values["devices"] * values["num_nodes"]
    if count > 1:
        chooser.choose("strategy", *suit_strategy(values, facts))
        require_shareable(values, count, len(facts.documents.names))


def require_fp8(precision: str, facts: Facts) -> None:
    """Raises ConfigError if a device has no products of FP8, or they do not give a precision."""
    if why := fp8_objection(facts.device):
        raise ConfigError(
            f"--quant fp8 needs a card that multiplies FP8, and {why}: use int8, which takes half "
            "the memory, or none"
        )
    if precision != "bf16":
        raise ConfigError(f"--quant fp8 gives bf16, and --precision is {precision}: use bf16")


def choose_memory(chooser: Chooser, facts: Facts) -> None:
    """Chunks, recomputing, and what stays on the host.

    Raises:
        ConfigError: it cannot, and that was asked for.
    """
    values, can_leave = chooser.values, has_host_memory(facts.device)
    if values["grad_cp"] == 2 and not can_leave:
        raise ConfigError(
            "--grad_cp 2 has inputs of blocks wait in the host's memory, on GPUs of NVIDIA and "
            f"AMD, and this is {facts.device.type}: give 1"
        )
    if values["optimizer_cpu"]:
        _require_optimizer_on_host(values, facts)
    if is_infctx(values):
        _choose_chunks(chooser, facts)
    what = "a chunk" if is_infctx(values) else "a micro-batch"
    is_deep = not _fits_with(values, facts, values["grad_cp"] or 0)
    # the embedding first, as a step takes few of its rows
    _choose_embedding(chooser, facts, is_deep=is_deep)
    is_deepest = is_deep and can_leave and not _fits_with(values, facts, 1)
    reason = f"{what} would not fit otherwise" if is_deep else f"{what} fits without"
    chooser.choose("grad_cp", is_deep + is_deepest, reason)
    # last, as each step takes longer by it
    _choose_optimizer(chooser, facts)


def _require_optimizer_on_host(values: Mapping[str, Any], facts: Facts) -> None:
    """Raises ConfigError if what an optimizer remembers cannot stay on the host."""
    if not has_host_memory(facts.device):
        why = f"{facts.device.type} cannot read the host's memory by itself"
        raise ConfigError(f"--optimizer_cpu 1: {why}: give 0")
    if stage_of(values["strategy"]) and values["devices"] * values["num_nodes"] > 1:
        raise ConfigError(
            f"--optimizer_cpu 1: --strategy {values['strategy']} has DeepSpeed's own: give 0, and "
            "--strategy deepspeed_stage_2_offload"
        )


def _choose_optimizer(chooser: Chooser, facts: Facts) -> None:
    """Whether what the optimizer remembers stays on the host: only where nothing else fits."""
    values, size = chooser.values, dtype_of(chooser.values["precision"]).itemsize
    num_trained = guess_trained(facts.num_weights, trains_all=values["peft"] == "none")
    is_short = has_host_memory(facts.device) and not _fits_with(
        values, facts, values["grad_cp"], usable=1
    )
    if values["peft"] == "state":
        is_short, reason = False, "there is little to leave"
    elif is_short and values["devices"] * values["num_nodes"] > 1:
        is_short, reason = False, "several devices were not measured so"
    elif is_short and not has_room_on_host(num_trained, size, values["optimizer"]):
        is_short, reason = False, "the host has no room for it"
    else:
        reason = "memory is short" if is_short else "there is room on the device"
    chooser.choose("optimizer_cpu", int(is_short), reason)


def _choose_embedding(chooser: Chooser, facts: Facts, *, is_deep: bool) -> None:
    """Whether the embedding stays on the host.

    Args:
        is_deep: blocks are recomputed where nothing was said.
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
    grad_cp = is_deep if values["grad_cp"] is None else values["grad_cp"]
    is_short = can_be and not is_trained and not _fits_with(values, facts, grad_cp)
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


def choose_step(chooser: Chooser, facts: Facts, positions: int) -> None:
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
    is_shared, stage = values["devices"] * values["num_nodes"] > 1, stage_of(values["strategy"])
    shares = is_shared and (values["strategy"] == "fsdp" or stage == 3)
    if facts.device.type == "cpu":
        compiles, reason = False, "on a CPU it seldom pays"
    elif is_shared and stage == 3:
        compiles, reason = False, "stage 3 was not measured compiled: 1 asks for it"
    elif missing:
        compiles, reason = False, f"the blocks would be faster compiled, which needs {missing}"
    elif values["dataload"] == "pad" and not is_infctx(values):
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
    elif captures and is_shared and stage:
        captures, reason = False, "DeepSpeed takes gradients while a step goes on"
    chooser.choose("cuda_graph", int(captures), reason)


def _choose_chunks(chooser: Chooser, facts: Facts) -> None:
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


def _fits_with(
    values: dict[str, Any], facts: Facts, grad_cp: int, *, usable: float = USABLE
) -> bool:
    """Whether what has activations at once fits with so much recomputing."""
    chunk_ctx = values["chunk_ctx"] if is_infctx(values) else 0
    return _chunk_fits({**values, "grad_cp": grad_cp}, facts, chunk_ctx, usable=usable)


def _chunk_fits(
    values: dict[str, Any], facts: Facts, chunk_ctx: int, *, usable: float = USABLE
) -> bool:
    """Whether chunks of so many tokens fit into the device, recomputed only if that was asked."""
    is_full = values["peft"] == "none"
    return fits(
        facts,
        dtype_of(values["precision"]),
        op=values["op"],
        positions=values["micro_bsz"] * positions_at_once(values["ctx_len"], chunk_ctx),
        trains_all=is_full,
        grad_cp=values["grad_cp"] or 0,
        quant=values["quant"],
        has_head=bool(values["quant_head"]),
        optimizer=values["optimizer"],
        optimizer_cpu=bool(values["optimizer_cpu"]),
        emb_cpu=bool(values["emb_cpu"]),
        num_ranks=values["devices"] * values["num_nodes"] if values["strategy"] == "fsdp" else 1,
        usable=usable,
    )


def is_infctx(values: dict[str, Any]) -> bool:
    """Whether rows go through the model in chunks."""
    return bool(values["train_type"] == "infctx" or values["bptt_chunks"])
