"""Weights of a fresh RWKV-7, initialised as in official pre-training.

Source: RWKV-LM, RWKV-v7/train_temp/src/model.py, `__init__` of both mixers and
`generate_init_weight`.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from rwkv_peft.models.config import ModelConfig


def default_ranks(n_embd: int) -> dict[str, int]:
    """Low-rank widths that official pre-training gives a new model, multiples of 32."""

    def width(factor: float) -> int:
        return max(32, round(factor * math.sqrt(n_embd) / 32) * 32)

    return {"w": width(2.5), "a": width(2.5), "v": width(1.7), "g": width(5.0)}


def fresh_model(sizes: ModelConfig, seed: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config of a new RWKV-7 of these sizes, with the default low-rank widths, and its weights.

    See `initial_weights`; `sizes.ranks` is not read.
    """
    ranks = default_ranks(sizes.n_embd)
    model_config = replace(sizes, ranks=ranks, has_first_value_mix=False)
    return model_config, initial_weights(model_config, seed)


def initial_weights(model_config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """All tensors of a new RWKV-7 by official name, in official order, float32."""
    generator = torch.Generator().manual_seed(seed)
    V, D, L = model_config.vocab_size, model_config.n_embd, model_config.n_layer
    weights = {"emb.weight": torch.empty(V, D).uniform_(-1e-4, 1e-4, generator=generator)}
    for layer in range(L):
        prefix = f"blocks.{layer}."
        norms = ("ln1", "ln2", "ln0") if layer == 0 else ("ln1", "ln2")
        for norm in norms:
            weights[f"{prefix}{norm}.weight"] = torch.ones(D)
            weights[f"{prefix}{norm}.bias"] = torch.zeros(D)
        for name, value in _time_mix(model_config, layer, generator).items():
            weights[f"{prefix}att.{name}"] = value
        for name, value in _channel_mix(model_config, layer, generator).items():
            weights[f"{prefix}ffn.{name}"] = value
    weights["ln_out.weight"], weights["ln_out.bias"] = torch.ones(D), torch.zeros(D)
    weights["head.weight"] = _orthogonal(V, D, 0.5 * max(1.0, math.sqrt(V / D)), generator)
    return weights


def _time_mix(
    model_config: ModelConfig, layer: int, generator: torch.Generator
) -> dict[str, Tensor]:
    D, L, N = model_config.n_embd, model_config.n_layer, model_config.head_size
    depth = layer / max(L - 1, 1)  # 0 in the first layer, 1 in the last
    rest = 1 - layer / L
    channel = torch.arange(D) / D
    linear = torch.arange(D) / (D - 1) - 0.5
    zigzag = (torch.arange(D) % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()

    def row(values: Tensor) -> Tensor:
        return values.reshape(1, 1, D)

    weights = {
        f"x_{name}": row(1 - channel ** (power * rest))
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items()
    }
    decay = -6 + 6 * (torch.arange(D) / (D - 1)) ** (1 + depth**0.3)
    biases = {
        "w": decay + 0.5 + zigzag * 2.5,
        "a": -0.19 + zigzag * 0.3 + linear * 0.4,
        "v": 0.73 - linear * 0.4,
        "g": None,
    }
    for name, bias in biases.items():
        rank = model_config.ranks[name]
        if name == "v" and layer == 0 and not model_config.has_first_value_mix:
            continue
        if bias is not None:
            weights[f"{name}0"] = row(bias)
        weights[f"{name}1"] = torch.zeros(D, rank)
        weights[f"{name}2"] = _orthogonal(rank, D, 0.1, generator)
    weights["k_k"] = row(0.71 - linear * 0.1)
    weights["k_a"] = torch.full((1, 1, D), 1.02)
    weights["r_k"] = torch.full((model_config.n_head, N), -0.04)
    weights["receptance.weight"] = _orthogonal(D, D, 1.0, generator)
    weights["key.weight"] = _orthogonal(D, D, 0.1, generator)
    weights["value.weight"] = _orthogonal(D, D, 1.0, generator)
    weights["output.weight"] = torch.zeros(D, D)
    weights["ln_x.weight"] = torch.full((D,), ((1 + layer) / L) ** 0.7)
    weights["ln_x.bias"] = torch.zeros(D)
    return weights


def _channel_mix(
    model_config: ModelConfig, layer: int, generator: torch.Generator
) -> dict[str, Tensor]:
    D, F = model_config.n_embd, model_config.dim_ffn
    rest = 1 - layer / model_config.n_layer
    return {
        "x_k": (1 - (torch.arange(D) / D) ** (rest**4)).reshape(1, 1, D),
        "key.weight": _orthogonal(F, D, 1.0, generator),
        "value.weight": torch.zeros(D, F),
    }


def _orthogonal(rows: int, columns: int, gain: float, generator: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain, generator=generator)
