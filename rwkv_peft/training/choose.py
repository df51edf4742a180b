"""Choosing what the user left open, once, when all that the choices depend on is known."""

import math
from dataclasses import replace
from secrets import randbelow
from typing import Any, NamedTuple

from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import Batches
from rwkv_peft.data.documents import Documents
from rwkv_peft.device import (
    choose_precision,
    free_host_memory,
)
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.catalog import resolve
from rwkv_peft.methods.stored import require_served
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.printing import counted
from rwkv_peft.training.choose_device import (
    choose_memory,
    choose_step,
    choose_strategy,
    is_infctx,
    require_fp8,
)
from rwkv_peft.training.chooser import Chooser
from rwkv_peft.training.defaults import (
    add_options,
    choose_last_rate,
    choose_rate,
    choose_warmup,
    longest_chosen,
)
from rwkv_peft.training.settings import Choice, Facts, Settings

# tokens of a micro-batch aimed at; more keeps a GPU busier but costs memory
TOKENS_PER_MICRO_BATCH = 1024
PACKED = "documents share rows, each with a state of its own, so that next to nothing is padding"
# with fewer documents one pass is seldom enough
SMALL_SET = 1000
# of the host's memory, in tokens, targets, weights and segment ids
BYTES_OF_POSITION = 24


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

    def steps_from(self, position: int) -> int:
        """Optimizer steps from a place in the data to the end; none goes over an epoch's end."""
        epoch, taken = divmod(position, self.micro_batches)
        begun = -(-(self.micro_batches - taken) // self.window)
        whole = -(-self.micro_batches // self.window)
        left = self.settings.epoch_count - epoch
        return begun + (left - 1) * whole if left > 0 else 0


def choose(config: TrainConfig, facts: Facts) -> Plan:
    """Settings from what the user said and what is known; what was said is never changed.

    Raises:
        ConfigError: settings contradict each other or the facts.
        DataError: the documents give no row.
    """
    chooser = Chooser(with_method(config, facts.saved_method))
    _choose_run(chooser, facts, is_open=config.peft == "auto")
    is_left_open = not (config.peft_config or config.load_adapter or config.peft == "auto")
    if is_left_open and (options := chooser.values["peft_config"]):
        chooser.set("peft_config", options, "what suits most tasks with this method")
    if chooser.values["quant_head"] and chooser.values["quant"] == "none":
        raise ConfigError("--quant_head 1 stores the head as --quant says: give --quant too")
    if chooser.values["quant"] != "none":
        require_served(chooser.values["peft"], chooser.values["peft_config"])
    if chooser.values["quant"] == "fp8":
        require_fp8(chooser.values["precision"], facts)
    _choose_rows(chooser, facts)
    _choose_training(chooser, facts.documents, facts.model_config)
    choose_memory(chooser, facts)
    batches = make_batches(chooser.values, facts.documents)
    _require_room(batches)
    micro_batches, steps = count_steps(chooser.values, len(batches))
    chooser.choose("warmup_steps", *choose_warmup(steps))
    positions = micro_batches * chooser.values["epoch_count"] * batches.positions
    choose_step(chooser, facts, positions)
    window = window_of(chooser.values)
    return Plan(Settings(**chooser.values), chooser.choices, batches, micro_batches, window, steps)


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


def _choose_run(chooser: Chooser, facts: Facts, *, is_open: bool) -> None:
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
    choose_strategy(chooser, facts)
    if values["random_seed"] < 0:
        chooser.set("random_seed", randbelow(2**31), "drawn; give it to repeat the run")


def _choose_rows(chooser: Chooser, facts: Facts) -> None:
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
    if not is_infctx(values):
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


def _choose_training(chooser: Chooser, documents: Documents, model_config: ModelConfig) -> None:
    """Epochs and rates."""
    values = chooser.values
    few = len(documents) < SMALL_SET
    reason = f"{counted(len(documents), 'document')}, {'which are few' if few else 'which suffice'}"
    chooser.choose("epoch_count", 3 if few else 1, reason)
    chooser.choose("lr_init", *choose_rate(values, model_config))
    chooser.choose("lr_final", *choose_last_rate(values))
