"""Guesses of the memory that training takes, before it takes it."""

import torch

from rwkv_peft.device import free_host_memory
from rwkv_peft.models import build
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.parallel.strategy import stage_of
from rwkv_peft.quant import STORAGES, stored_layers
from rwkv_peft.quant.linear import MAX_DENSE
from rwkv_peft.training.borders import Room
from rwkv_peft.training.optimizers import OPTIMIZERS
from rwkv_peft.training.settings import Facts, Settings

# vectors (B*T, D) that a block keeps for backward, measured in the compute dtype, those that pass
# by in a block's backward, and those in float32 that the chunked operator keeps
KEPT_VECTORS, PASSING_VECTORS, KEPT_BY_TORCH = 37, 10, 13
# what states at borders may have on a device, and their share of the host's free memory
BORDERS_ON_DEVICE, BORDERS_SHARE = 1 << 30, 0.5
# the share of the free memory that a guess may take
USABLE = 0.8
# the share of the host's free memory that an optimizer may leave there unasked: pinned memory comes
# in powers of two
LEFT_SHARE = 0.5
# where nobody can say what is free
UNKNOWN_MEMORY = 8 << 30


def guess_memory(
    settings: Settings, model_config: ModelConfig, op: str, num_weights: int, num_trained: int
) -> float:
    """Bytes that training may take on its device: weights, what trains them, activations, logits.

    States at borders are not among them.
    """
    positions = positions_at_once(settings.ctx_len, settings.chunk_ctx * settings.is_infctx)
    size, is_full = settings.dtype.itemsize, settings.peft == "none"
    has_one_backward = not settings.is_infctx and (
        settings.accumulate_grad_batches * settings.num_ranks == 1
    )
    each = bytes_of_training(
        size,
        settings.optimizer,
        has_one_backward=has_one_backward,
        on_host=bool(settings.optimizer_cpu),
    )
    guess = guess_bytes(
        model_config,
        settings.dtype,
        op,
        settings.micro_bsz * positions,
        num_weights,
        num_trained * (each if is_full else each + size),
        grad_cp=settings.grad_cp,
        quant=settings.quant,
        has_head=bool(settings.quant_head),
        emb_cpu=bool(settings.emb_cpu),
    )
    if settings.strategy == "fsdp" and settings.num_ranks > 1:
        guess -= spared_bytes(
            model_config,
            settings.dtype,
            num_weights,
            num_trained,
            settings.num_ranks,
            trains_weights=is_full,
            quant=settings.quant,
        )
    if (stage := stage_of(settings.strategy)) and settings.num_ranks > 1:
        tables = 2 * model_config.vocab_size * model_config.n_embd
        guess -= _spared_by_stage(settings, stage, num_weights - tables, num_trained)
    return guess


def guess_bytes(
    model_config: ModelConfig,
    dtype: torch.dtype,
    op: str,
    positions: int,
    num_weights: int,
    training: float,
    *,
    grad_cp: int,
    quant: str = "none",
    has_head: bool = False,
    emb_cpu: bool = False,
) -> float:
    """`guess_memory` for so many positions, those of all rows, that have activations at once.

    Args:
        training: bytes of what is trained beside the model's weights, and of what trains it.
    """
    size, layers = dtype.itemsize, model_config.n_layer
    vectors = positions * model_config.n_embd
    kept = vectors * (KEPT_VECTORS * size + (KEPT_BY_TORCH * 4 if op == "torch" else 0))
    # of a block that is recomputed its input alone is kept
    borders = vectors * size * layers if grad_cp == 1 else 0
    activations = kept + borders if grad_cp else kept * layers
    activations += vectors * PASSING_VECTORS * size
    logits = min(positions * model_config.vocab_size, 1 << 24) * 12
    weights, dense, dense_layer = _weigh(model_config, num_weights, size, quant, has_head)
    # where nothing is recomputed a graph has those of a layer dense beside a recurrence
    weights += dense if grad_cp else max(dense, dense_layer)
    weights -= model_config.vocab_size * model_config.n_embd * size * emb_cpu
    return weights + training + activations + logits


def _spared_by_stage(settings: Settings, stage: int, in_blocks: int, num_trained: int) -> float:
    """Bytes that a stage of DeepSpeed spares a device, as other ranks or the host have them."""
    size, others = settings.dtype.itemsize, 1 - 1 / settings.num_ranks
    is_narrow = size == 2
    # float32 values beside 16-bit ones are whole
    spared = -num_trained * 2.0 * is_narrow
    in_parts = num_trained * (8.0 + 4 * is_narrow)
    spared += in_parts * (1 if settings.strategy.endswith("offload") else others)
    spared += num_trained * 4 * others * (stage > 1)
    return spared + in_blocks * size * others * (stage > 2)


def bytes_of_training(
    size: int,
    optimizer: str = "adamw",
    *,
    has_one_backward: bool = False,
    on_host: bool = False,
) -> int:
    """Bytes beside a trained weight of `size`: its gradient, moments, and the rest of float32.

    Args:
        has_one_backward: of a step, whose gradients stay as they come.
        on_host: all but the gradient is on the host.
    """
    gradient = size if has_one_backward else 4
    if on_host:
        return gradient
    return gradient + OPTIMIZERS[optimizer].moments + (0 if size == 4 else 2)


def spared_bytes(
    model_config: ModelConfig,
    dtype: torch.dtype,
    num_weights: int,
    num_trained: int,
    num_ranks: int,
    *,
    trains_weights: bool,
    quant: str = "none",
) -> float:
    """Bytes that fsdp spares a device, as other ranks have them, less what it gathers to work with.

    Args:
        trains_weights: those of the model are trained, and in parts; an adapter is whole.
    """
    size, tables = dtype.itemsize, 2 * model_config.vocab_size * model_config.n_embd
    others = num_weights - tables
    if trains_weights:
        parts = float(num_weights * size + num_trained * bytes_of_training(size))
        block = others / model_config.n_layer
        # two blocks and both tables; gradients of those and of a block, on their way in float32
        gathered = (2 * block + tables) * size + (block + tables) * (size + 4)
    else:
        # embedding and head are whole, and scales, and one weight that is dense for its product
        parts = _share(model_config, others, size, quant)
        gathered = 2 * parts / model_config.n_layer
    return parts * (1 - 1 / num_ranks) - gathered


def weigh_base(
    model_config: ModelConfig, num_weights: int, size: int, quant: str, has_head: bool = False
) -> float:
    """Bytes of a model's weights, of `size` each but for what is stored, and of dequantising."""
    weights, dense, _ = _weigh(model_config, num_weights, size, quant, has_head)
    return weights + dense


def _weigh(
    model_config: ModelConfig, num_weights: int, size: int, quant: str, has_head: bool
) -> tuple[float, float, float]:
    """Bytes of weights, and of those that are stored: of one, and of a layer's, that are dense."""
    if quant == "none":
        return num_weights * size, 0, 0
    plain = build(model_config, op="reference")
    layers = [layer for _, layer in stored_layers(plain, has_head=has_head)]
    in_blocks = sum(x.out_features * x.in_features for _, x in stored_layers(plain))
    numbers = [layer.out_features * layer.in_features for layer in layers]
    count_bytes = STORAGES[quant].count_bytes
    stored = sum(count_bytes(layer.out_features, layer.in_features) for layer in layers)
    weights = (num_weights - sum(numbers)) * size + stored
    if quant == "fp8":
        return weights, 0, 0
    # one weight at a time is dense for its product
    dense = min(max(numbers), MAX_DENSE) * size
    return weights, dense, in_blocks * size / model_config.n_layer


def _share(model_config: ModelConfig, in_blocks: int, size: int, quant: str) -> float:
    """Bytes of blocks that can be shared out: what is stored without its scales or other copies."""
    if quant == "none":
        return float(in_blocks * size)
    layers = [layer for _, layer in stored_layers(build(model_config, op="reference"))]
    stored = sum(layer.out_features * layer.in_features for layer in layers)
    return (in_blocks - stored) * size + stored * STORAGES[quant].bits / 8


def fits(
    facts: Facts,
    dtype: torch.dtype,
    *,
    op: str,
    positions: int,
    trains_all: bool,
    grad_cp: int,
    quant: str = "none",
    has_head: bool = False,
    num_ranks: int = 1,
    optimizer: str = "adamw",
    optimizer_cpu: bool = False,
    emb_cpu: bool = False,
    usable: float = USABLE,
) -> bool:
    """Whether so many positions leave a fifth of a device's free memory free, as far as is known.

    Args:
        op: as it was asked for.
        trains_all: all weights are trained, or else a small part.
        num_ranks: devices that have parts of the model each.
        usable: another share of the free memory that they may take.
    """
    if op == "auto" and facts.device.type == "cpu":
        op = "torch"
    num_trained = guess_trained(facts.num_weights, trains_all=trains_all)
    guess = guess_bytes(
        facts.model_config,
        dtype,
        op,
        positions,
        facts.num_weights,
        num_trained * bytes_of_training(dtype.itemsize, optimizer, on_host=optimizer_cpu),
        grad_cp=grad_cp,
        quant=quant,
        has_head=has_head,
        emb_cpu=emb_cpu,
    )
    if num_ranks > 1:
        guess -= spared_bytes(
            facts.model_config,
            dtype,
            facts.num_weights,
            num_trained,
            num_ranks,
            trains_weights=trains_all,
            quant=quant,
        )
    free = UNKNOWN_MEMORY if facts.memory is None else facts.memory
    return guess <= usable * free


def guess_trained(num_weights: int, *, trains_all: bool) -> int:
    """How many numbers may be trained, before a method says it."""
    return num_weights if trains_all else num_weights // 20


def has_room_on_host(num_trained: int, size: int, optimizer: str) -> bool:
    """Whether the host has room for what an optimizer remembers of weights of `size`."""
    left = bytes_of_training(size, optimizer) - bytes_of_training(size, optimizer, on_host=True)
    free = free_host_memory()
    return free is None or num_trained * left <= LEFT_SHARE * free


def fits_whole(settings: Settings, facts: Facts, num_trained: int) -> bool:
    """Whether a device that has a part of a model has room for it whole, from forward to backward.

    A guess leaves a fifth of the free memory free; it is no where nobody can say what is free.
    """
    if facts.memory is None:
        return False
    guess = guess_memory(settings, facts.model_config, settings.op, facts.num_weights, num_trained)
    return guess + facts.num_weights * settings.dtype.itemsize <= USABLE * facts.memory


def positions_at_once(ctx_len: int, chunk_ctx: int) -> int:
    """Positions of a row that have activations at the same time; chunk_ctx 0: all."""
    return min(ctx_len, chunk_ctx) if chunk_ctx else ctx_len


def room_for_borders(device: torch.device, free: int | None, host: int | None) -> Room:
    """The memory that states at borders may take, of what is free on a device and the host."""
    on_host = int((UNKNOWN_MEMORY if host is None else host) * BORDERS_SHARE)
    if device.type == "cpu":
        return Room(0, on_host)
    on_device = min(BORDERS_ON_DEVICE, (UNKNOWN_MEMORY if free is None else free) // 16)
    return Room(on_device, on_host)
