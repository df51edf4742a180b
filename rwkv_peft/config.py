"""The settings of a training run, with RWKV-PEFT's names: fields, YAML keys and flags are the same.

A field that is None (or 'auto') is chosen when the model and the data are known, in
`training.choose`; the choice is printed with its reason and saved with the run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from rwkv_peft.errors import ConfigError
from rwkv_peft.guard import require_paths

Switch = Literal[0, 1]
AutoSwitch = Literal["auto", 0, 1]
# what an adapter file of older RWKV-PEFT does not hold; see `checkpoint.older.LegacyAdapterHints`
UNSAVED = ("lora_alpha", "pissa_init", "lora_dropout")
# a user's template, as a run keeps it in its folder
TEMPLATE_FILE = "template.jinja"
# fields of TrainConfig with a lowest value
POSITIVE = ["ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_save", "devices", "num_nodes"]
POSITIVE += ["adam_eps"]
NOT_NEGATIVE = ["chunk_ctx", "epoch_count", "epoch_steps", "epoch_begin", "lr_init", "lr_final"]
NOT_NEGATIVE += ["save_every_steps", "save_every_minutes", "keep", "val_every_steps", "grad_clip"]
NOT_NEGATIVE += ["early_stopping_patience", "warmup_steps", "num_workers", "weight_decay", "l2wrap"]
# fields that 0 leaves open, as None and auto do others
OPEN_AT_ZERO = ("chunk_ctx", "bptt_chunks")
DataType = Literal[
    "auto",
    "jsonl",
    "text",
    "messages",
    "sharegpt",
    "alpaca",
    "completion",
    "sft",
    "binidx",
    "numpy",
    "uint16",
    "utf-8",
    "utf-16le",
]


def require_finite(options: Any) -> None:
    """Raises ConfigError if a dataclass of options holds NaN or infinity, however deep.

    Nor does anything here count with whole numbers of more than 64 bits, or take nothing for a
    value, as `null` in a file gives it, where that has no meaning.
    """
    for item in fields(options):
        if getattr(options, item.name) is None and type(None) not in get_args(item.type):
            raise ConfigError(f"--{item.name}: got nothing: leave it out, and it has its default")
        for where, value in _iterate_values(f"--{item.name}", getattr(options, item.name)):
            if isinstance(value, int):
                if abs(value) >= 2**63:
                    bits = value.bit_length()
                    raise ConfigError(f"{where}: got a number of {bits} bits, allowed are 63")
            elif not math.isfinite(value):
                raise ConfigError(f"{where}: got {value}, allowed is a finite number")


def _iterate_values(where: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers in a value, each with its place."""
    if isinstance(value, (int, float)):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            # as JSON spells them, which YAML reads as texts
            inner = float(inner) if inner in ("NaN", "Infinity", "-Infinity") else inner
            yield from _iterate_values(f"{where}: {key}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _iterate_values(where, inner)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which texts to learn and how they are read."""

    data_file: str = ""
    """Files or folders to learn from; several as a.jsonl,b.jsonl or a.jsonl:0.7,b.jsonl:0.3."""
    data_type: DataType = "auto"
    """Format; found from the file's ending and the keys of its rows if auto."""
    sft_field: list[str] = field(default_factory=list)
    """Columns to learn: question and answer, or question, input and answer, or one of text."""
    sft_split: str = "train"
    """Rows to take, as Hugging Face datasets writes it: train[:1000], train[10%:20%]."""
    template: str = "auto"
    """How turns are written: chat, think, function, document, alpaca, or a Jinja file.

    auto is chat, but alpaca for data_type sft.
    """
    loss_mask: str = "auto"
    """What is trained: none or pad (all), qa, se, roles=assistant,tool, or auto.

    qa is the assistant's words and their end, se what stands between the marks of mask_id; auto is
    qa for rows with roles and none for texts.
    """
    mask_id: dict[str, str] = field(default_factory=dict)
    """Marks of se, texts or token ids: mask1 begins what is trained, mask0 ends it."""
    train_role_words: Switch = 0
    """1 also trains the words that open a chosen turn, such as 'Assistant:', as of old."""
    append_eod: Switch = 1
    """1 puts the end-of-document token 0 behind each text."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be read stops the run, or is skipped and listed."""
    max_untrained: float = 0.1
    """Largest share of documents in which the mask may leave nothing to train."""
    data_cache: str = ""
    """Folder of prepared data; the user's cache folder if empty."""
    prepare_workers: int = 1
    """Processes that tokenise; at most one a core is used."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_paths(self)
        if len(self.sft_field) > 3:
            raise ConfigError(
                f"--sft_field names {len(self.sft_field)} columns: give question and answer, "
                "question, input and answer, or one of text"
            )
        if not all(self.sft_field) or len(set(self.sft_field)) < len(self.sft_field):
            raise ConfigError(
                f"--sft_field {' '.join(map(repr, self.sft_field))}: give the name of a column, "
                "and each once"
            )
        if self.sft_field and self.data_type not in ("auto", "jsonl", "sft"):
            raise ConfigError(f"--sft_field is for --data_type sft, not {self.data_type}")
        if not 0 <= self.max_untrained <= 1:
            raise ConfigError(f"--max_untrained must lie in [0, 1], got {self.max_untrained}")
        if self.prepare_workers < 0:
            raise ConfigError(f"--prepare_workers must not be below 0, got {self.prepare_workers}")

    @property
    def template_name(self) -> str:
        """The template, chosen if it was left open."""
        if self.template != "auto":
            return self.template
        return "alpaca" if self.data_type == "sft" else "chat"


@dataclass(frozen=True, slots=True)
class TrainConfig(DataConfig):
    """Settings of one training run."""

    load_model: str = ""
    """The official weights to start from (.pth or .safetensors)."""
    check_files: Switch = 1
    """1 compares the checksums of .pth files before they are used, at 1 to 3 GB a second and core;
    0 does not."""
    proj_dir: str = ""
    """Folder of the run's results; 'out', or the first free of out-2, out-3 …, if empty."""
    overwrite: Switch = 0
    """1 removes the files of the run that proj_dir holds, and no others, once the first step is
    done; 0 refuses such a folder."""

    save_every_steps: int = 0
    """Make a checkpoint, from which --resume goes on, after every so many optimizer steps; 0: only
    where Ctrl-C or another signal ends the run."""
    save_every_minutes: float = 0.0
    """Make a checkpoint at the first step after every so many minutes; 0: not by time."""
    keep: int = 2
    """Newest checkpoints to keep; 0: all."""
    on_save_error: Literal["skip", "stop"] = "skip"
    """A checkpoint that cannot be written is skipped with a word, or stops the run."""
    resume: str = ""
    """Go on from a checkpoint as if the run had never stopped: its folder, or auto for the newest
    whole one of proj_dir; where auto finds none, the run begins."""
    resume_changes: list[str] = field(default_factory=list)
    """Settings in which a resumed run may differ from the one that stopped, by name."""

    peft: str = "auto"
    """Method: none for full tuning, state, or one of Hugging Face peft's by its name there, such as
    lora, pissa, miss, adalora, vera, oft; lora if auto."""
    peft_config: dict[str, Any] = field(default_factory=dict)
    """Options of the method as JSON, those of Hugging Face peft: {"r": 8, "lora_alpha": 32}."""
    train_parts: list[str] = field(default_factory=list)
    """Parts of the model to train beside the method (with none: alone), by substrings of names:
    emb, head, ln, time, or any other."""
    load_adapter: str = ""
    """A saved adapter's folder, or a state file, to train further in place of a new one.

    Also an adapter file of older RWKV-PEFT: for LoRA with its {"lora_alpha": 32} as peft_config,
    for PiSSA with {"pissa_init": "init_pissa.pth"}.
    """
    force: bool = False
    """Continue an adapter on another base than it was trained on."""
    fused_adapter: Switch = 1
    """1 computes LoRA and MiSS in fewer passes over memory; 0 leaves them to peft's own layers."""
    train_type: Literal["none", "state", "fullstate", "infctx"] = "none"
    """Kind of training besides the method: state learns the initial state alone, as --peft state
    does; fullstate with the vectors before the first token; infctx takes rows of any length through
    the model in chunks, with any method."""
    merge: Switch = 1
    """After each epoch: 1 also writes a merged model, 0 only the adapter."""

    ctx_len: int | None = None
    """Longest row in tokens; longer documents are split, not cut."""
    chunk_ctx: int = 0
    """Tokens of a chunk of infctx, of which memory depends and not of ctx_len; 0: chosen."""
    bptt_chunks: int | Literal["all"] = 0
    """Chunks of infctx over which a gradient goes back: all (exact) to the beginning of the row, 1
    to that of the chunk; 0: chosen. It also has state and fullstate go in chunks."""
    micro_bsz: int | None = None
    """Rows of one forward pass."""
    accumulate_grad_batches: int = 1
    """Forward passes of one optimizer step, on each device."""
    dataload: Literal["auto", "pack", "pad", "only", "get"] = "auto"
    """How documents become rows: pack lays them end to end, each with a state of its own; pad lays
    one in a row; only is pad with one row and no padding; get cuts windows wherever they fall, the
    state running on over the borders; pack if auto and possible."""
    data_shuffle: Switch = 1
    """1 draws a new order each epoch, 0 keeps the order of the file."""
    epoch_count: int | None = None
    """Epochs to train; 0 saves what training would begin with."""
    epoch_steps: int = 0
    """At most so many micro-batches an epoch, of all devices together; the next goes on where it
    stopped. 0: all."""
    epoch_unit: Literal["steps", "samples"] = "steps"
    """What epoch_steps counts: steps are micro-batches; samples are the documents that are used at
    all, from the first, and an epoch is a pass over them."""
    epoch_begin: int = 0
    """Number of the first epoch in the names of files."""
    epoch_save: int = 1
    """Save after every so many epochs, and after the last."""

    val_file: str = ""
    """Files or folders to evaluate on before the first step, in training and at each epoch's end,
    as in data_file; they are not trained."""
    val_split: float = 0.0
    """In its place: the share of all documents kept aside, chosen by a hash of their texts."""
    val_every_steps: int = 0
    """Evaluate after every so many optimizer steps too."""
    val_prompts: str = ""
    """File of prompts that are continued at each evaluation by the likeliest tokens: texts, one a
    line, or JSON rows with a "prompt" or a "user"'s turn."""
    early_stopping_patience: int = 0
    """End the run after so many evaluations in a row without a new best; 0: never."""

    report_to: list[Literal["tensorboard", "wandb", "trackio", "swanlab"]] = field(
        default_factory=list
    )
    """Loggers that get the figures of each step and evaluation too."""
    wandb: str = ""
    """Project of these loggers; alone it asks for Weights & Biases."""

    lr_init: float | None = None
    """Learning rate at the start; 0 with --lr_final 0 moves nothing."""
    lr_final: float | None = None
    """Learning rate at the end."""
    lr_schedule: Literal["cos", "wsd"] = "cos"
    """cos falls all the way; wsd is stable, then falls over the last fifth of the steps."""
    warmup_steps: int | None = None
    """Optimizer steps over which the rate rises from a hundredth."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "adafactor", "sgd", "lion"] = "adamw"
    """How steps follow from gradients: AdamW, also with moments of 8 bits; Muon for matrices with
    AdamW for the rest; Adafactor; SGD with momentum; Lion."""
    beta1: float = 0.9
    """Decay of the mean of gradients of AdamW and Lion, and the momentum of SGD."""
    beta2: float = 0.99
    """Decay of AdamW's mean of squared gradients, and of Lion's mean."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 0.0
    """Decay of the model's own weight matrices; never of vectors, states or adapters."""
    adapter_decay: Switch = 0
    """1 lets weight_decay act on the matrices of an adapter too."""
    weight_decay_final: float = -1.0
    """Decay at the last step, reached geometrically; weight_decay throughout if negative."""
    layerwise_lr: Switch = 1
    """1 gives the vectors of the decay twice the rate (time_first three times), as officially, if
    they are trained; 0 does not."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together; 0 clips nothing."""
    l2wrap: float = 1e-4
    """Pull on each token's largest logit, as in RWKV's own training; 0 for none."""

    op: str = "auto"
    """Backend of the recurrence: auto, cuda, triton, fla, torch, reference."""
    accelerator: str = "auto"
    """Device: auto, gpu, cpu, cuda, mps, xpu, musa, npu, or one of several as in cuda:1."""
    devices: int = 1
    """Devices of this machine, or of each, that share the work; a CPU may be any number of them."""
    num_nodes: int = 1
    """Number of machines, on which srun or torchrun starts the run."""
    strategy: Literal[
        "auto",
        "single",
        "ddp",
        "fsdp",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_3",
        "deepspeed_stage_1_offload",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    ] = "auto"
    """How devices share the work: ddp has each hold the model, and adds up gradients; fsdp has each
    hold a part of frozen blocks, or of all; deepspeed_stage_1 to 3 of what trains the model."""
    quant: Literal["none", "int8", "nf4", "fp4", "nf4_nested", "fp4_nested", "fp8"] = "none"
    """How frozen projections are stored, for all methods but none, osf and frod: none as precision
    says; int8 with a scale for each row; nf4 and fp4 in 4 bits with a scale for 64 numbers, as in
    bitsandbytes; nf4_nested and fp4_nested with scales in 8 bits (QLoRA's double quantization).
    fp8 saves no memory, and multiplies in 8 bits on cards that can, which is faster."""
    quant_head: Switch = 0
    """1 stores the head too as quant says: less memory, and logits that are further off."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Dtype of weights and activations; trained tensors are stepped in float32."""
    num_workers: int = 1
    """Threads that prepare micro-batches ahead; 0 makes each when it is needed."""
    optimizer_cpu: Switch | None = None
    """1 leaves what the optimizer remembers on the host. Left open: 1 where nothing else fits."""
    emb_cpu: Switch | None = None
    """1 leaves the embedding, if it is not trained, in the host's memory, from which the GPU reads
    the rows that it needs. Left open: 1 where memory is short."""
    grad_cp: Literal[0, 1, 2] | None = None
    """1 recomputes blocks in backward: less memory, more time; 2 has their inputs on the host."""
    compile: AutoSwitch = "auto"
    """1 compiles the blocks (torch.compile), which takes some seconds once; 0 does not; auto where
    the run is long enough to gain by it, on a GPU with a C compiler at hand."""
    cuda_graph: AutoSwitch = "auto"
    """1 captures a micro-batch's kernels and launches them at once; auto: on GPUs that can."""
    random_seed: int = -1
    """Seed of initialisation, dropout and data order; drawn and printed if negative."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        for name in POSITIVE + NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name in POSITIVE)):
                limit = "be above 0" if name in POSITIVE else "not be below 0"
                raise ConfigError(f"--{name} must {limit}, got {value}")
        if self.bptt_chunks != "all" and self.bptt_chunks < 0:
            raise ConfigError(f"--bptt_chunks must not be below 0, got {self.bptt_chunks}")
        if self.bptt_chunks and self.train_type == "none" and self.peft != "state":
            raise ConfigError(
                f"--bptt_chunks {self.bptt_chunks} is for rows in chunks: give --train_type infctx"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name} must lie in [0, 1), got {getattr(self, name)}")
        known = [f.name for f in fields(TrainConfig)]
        for name in self.resume_changes:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else "give names of settings"
                raise ConfigError(f"--resume_changes: there is no setting {name}: {hint}")
        if self.resume_changes and not self.resume:
            raise ConfigError("--resume_changes needs --resume: auto, or a checkpoint's folder")
        if self.resume == "auto" and not self.proj_dir:
            raise ConfigError("--resume auto needs --proj_dir: the folder of the run")
        self._require_validation()
        if self.epoch_unit == "samples" and not self.epoch_steps:
            raise ConfigError("--epoch_unit samples needs --epoch_steps: how many documents to use")
        if self.dataload == "only" and self.micro_bsz not in (None, 1):
            raise ConfigError(
                f"--dataload only has one row a micro-batch, got --micro_bsz {self.micro_bsz}: use "
                "--micro_bsz 1 with a larger --accumulate_grad_batches, or --dataload pad"
            )
        if self.weight_decay_final > 0 and self.weight_decay <= 0:
            raise ConfigError("--weight_decay_final needs --weight_decay above 0 to start from")
        if self.load_adapter and (self.peft == "none" or self.peft_config.keys() - UNSAVED):
            raise ConfigError(
                "--load_adapter brings its own method and options: leave out --peft none and "
                f"--peft_config, but for the {', '.join(UNSAVED)} of an older RWKV-PEFT's file"
            )
        if self.peft in ("none", "state") and self.peft_config:
            raise ConfigError("--peft_config needs a method: give --peft lora, or leave it out")

    @property
    def is_evaluated(self) -> bool:
        """Whether documents are kept aside, on which the best of a run is found."""
        return bool(self.val_file or self.val_split)

    def _require_validation(self) -> None:
        """Raises ConfigError if what is said of evaluation lacks something to evaluate."""
        if not 0 <= self.val_split < 1:
            raise ConfigError(f"--val_split must lie in [0, 1), got {self.val_split}")
        if self.val_file and self.val_split:
            raise ConfigError("--val_file and --val_split exclude each other: give one of them")
        if self.early_stopping_patience and not self.is_evaluated:
            raise ConfigError("--early_stopping_patience needs --val_file or --val_split")
        if self.val_every_steps and not (self.is_evaluated or self.val_prompts):
            raise ConfigError(
                "--val_every_steps has nothing to evaluate: give --val_file, --val_split or "
                "--val_prompts"
            )

    def require_files(self) -> None:
        """Raises ConfigError unless both files are named, and that of the model exists."""
        for name, what in (("load_model", "model"), ("data_file", "data")):
            value = getattr(self, name)
            if not value:
                raise ConfigError(f"no {what} given: rwkv-peft train model.pth data.jsonl")
        if not Path(self.load_model).exists():
            raise ConfigError(f"--load_model: there is no file {self.load_model}")
