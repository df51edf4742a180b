"""Hugging Face folders: the native layout, with official names, and that of fla.

Source of names and of the config's keys: the Rwkv7 of transformers' fork rwkv-rs/transformers-rwkv
and `utils/convert_from_rwkv7.py` and `configuration_rwkv7.py` of flash-linear-attention.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint.records import damage_in_one_line
from rwkv_peft.checkpoint.stream import Spec, map_safetensors, round_to, write_file
from rwkv_peft.data.templates import Template
from rwkv_peft.data.tokenizer import BUNDLED_VOCAB_FILE
from rwkv_peft.errors import CheckpointError
from rwkv_peft.exports.layout import SAME, TRANSPOSED, VECTOR, Form, Layout, Rule, rule
from rwkv_peft.exports.stored import Stored, all_mapped
from rwkv_peft.exports.texts import END_OF_TEXT, to_jinja, tokenizer_json
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.recognise import SAFETENSORS, recognise

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
FILES = (
    CONFIG, INDEX, WEIGHTS, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json", BUNDLED_VOCAB_FILE.name,
)  # fmt: skip
# bytes of a file of weights, as transformers splits them
LARGEST_SHARD = 5_000_000_000
# bytes of a config or an index; a large index has some hundred thousand
LARGEST_CONFIG = 16 << 20
EPS = 1e-5
_UNREAD = frozenset(f"blocks.0.att.v{n}" for n in "012")
_HEAD = rule("head.weight", "head.weight")
NATIVE = Layout((_HEAD,), "model.", _UNREAD)


def _native_of(prefix: str) -> Layout:
    """A native layout as it is read: forms differ in the embedding's name, and some have the
    low-rank maps as linear layers.
    """
    maps = (f"blocks.{{i}}.att.{x}{n}" for x in "wavg" for n in "12")
    linear = (rule(name, f"{prefix}{name}.weight", TRANSPOSED) for name in maps)
    return Layout((_HEAD, rule("emb.weight", f"{prefix}embeddings.weight"), *linear), prefix)


# what begins the names of the forms of the native layout
_NATIVES = {prefix: _native_of(prefix) for prefix in ("model.", "rwkv7.")}


def _block(official: str, foreign: str, form: Form = SAME) -> Rule:
    return rule(f"blocks.{{i}}.{official}", f"model.layers.{{i}}.{foreign}", form)


FLA = Layout(
    (
        rule("emb.weight", "model.embeddings.weight"),
        rule("head.weight", "lm_head.weight"),
        *(rule(f"ln_out.{leaf}", f"model.norm.{leaf}") for leaf in ("weight", "bias")),
        *(
            _block(f"{a}.{leaf}", f"{b}.{leaf}")
            for a, b in (
                ("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"),
                ("att.ln_x", "attn.g_norm"),
            )
            for leaf in ("weight", "bias")
        ),
        *(
            _block(f"att.{name}.weight", f"attn.{name[0]}_proj.weight")
            for name in ("receptance", "key", "value", "output")
        ),
        *(_block(f"att.x_{x}", f"attn.x_{x}") for x in "rwkvag"),
        *(_block(f"att.{x}0", f"attn.{x}_lora.lora.2.bias", VECTOR) for x in "wav"),
        *(_block(f"att.{x}1", f"attn.{x}_lora.lora.0.weight", TRANSPOSED) for x in "wavg"),
        *(_block(f"att.{x}2", f"attn.{x}_lora.lora.2.weight", TRANSPOSED) for x in "wavg"),
        *(_block(f"att.{x}", f"attn.{x}", VECTOR) for x in ("k_k", "k_a")),
        _block("att.r_k", "attn.r_k"),
        _block("ffn.x_k", "ffn.x_k", VECTOR),
        _block("ffn.key.weight", "ffn.key.weight"),
        _block("ffn.value.weight", "ffn.value.weight"),
    ),
    None,
    _UNREAD,
)  # fmt: skip


# fla had the vectors of the token shift in one tensor at first
_STACKED = Form(
    lambda xs, i: torch.cat([x.reshape(1, -1) for x in xs]),
    lambda x, i, n: tuple(row.view(1, 1, -1) for row in x),
)
_SHIFTS = tuple(f"blocks.{{i}}.att.x_{x}" for x in "rwkvag")
_FLA_OF_ANY_TIME = Layout(
    (*FLA.rules, Rule(_SHIFTS, "model.layers.{i}.attn.x_x", _STACKED)), None, _UNREAD
)
# keys of a config by which programs compute, with what RWKV-7 has
ARITHMETIC = {
    "norm_eps": EPS, "layer_norm_epsilon": EPS, "group_norm_epsilon": 64 * EPS, "norm_bias": True,
    "norm_first": True, "hidden_act": "sqrelu", "tie_word_embeddings": False,
}  # fmt: skip


def find_layout(names: Collection[str]) -> Layout | None:
    """The layout of tensors with these names, whatever form of it; None if it is another."""
    ends = {"model.embeddings.weight", "lm_head.weight"}
    if any(name.startswith("model.layers.") for name in names) and not ends.isdisjoint(names):
        return _FLA_OF_ANY_TIME
    for prefix, layout in _NATIVES.items():
        if f"{prefix}emb.weight" in names or f"{prefix}embeddings.weight" in names:
            return layout
    return None


def make_config(model_config: ModelConfig, dtype: str, *, is_fla: bool) -> dict[str, Any]:
    """The content of config.json."""
    ranks, D = model_config.ranks, model_config.n_embd
    config: dict[str, Any] = {
        "architectures": ["RWKV7ForCausalLM" if is_fla else "Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": model_config.vocab_size,
        "hidden_size": D,
        "attention_hidden_size": model_config.dim_att,
        "num_hidden_layers": model_config.n_layer,
        "num_heads": model_config.n_head,
        "num_attention_heads": model_config.n_head,
        "head_dim": model_config.head_size,
        "intermediate_size": model_config.dim_ffn,
        "decay_low_rank_dim": ranks["w"],
        "a_low_rank_dim": ranks["a"],
        "v_low_rank_dim": ranks["v"],
        "gate_low_rank_dim": ranks["g"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if is_fla:
        return config | {
            "attn_mode": "chunk",
            "attn": None,
            "hidden_act": "sqrelu",
            "hidden_ratio": model_config.dim_ffn / D,
            "value_dim": [D] * model_config.n_layer,
            "norm_first": True,
            "norm_bias": True,
            "norm_eps": EPS,
            "fuse_norm": True,
        }
    return config | {
        "head_size": model_config.head_size,
        "value_low_rank_dim": ranks["v"],
        "deep_embedding_size": None,
        "layer_norm_epsilon": EPS,
        "group_norm_epsilon": 64 * EPS,
        "rescale_every": 0,
        "embedding_layer_norm_fused": False,
        "wkv_mode": "fp32io16",
    }


def write(
    folder: Path,
    official: Mapping[str, Stored],
    model_config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    template: Template,
    *,
    is_fla: bool,
) -> None:
    """Fills a folder: weights in shards, config, tokenizer and chat template.

    Args:
        dtypes: of each official tensor as it is to be stored.
    Raises:
        CheckpointError: a value does not fit its dtype, or is not finite.
    """
    layout = FLA if is_fla else NATIVE
    cast = {n: _cast(n, x, dtypes[n]) for n, x in official.items()}
    tensors = layout.to_foreign(cast)
    _write_weights(folder, tensors)
    main = max(set(dtypes.values()), key=list(dtypes.values()).count)
    config = make_config(model_config, str(main).removeprefix("torch."), is_fla=is_fla)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": False,
        "model_max_length": int(1e30),
        "chat_template": to_jinja(template),
        **special,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    texts = {
        CONFIG: config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": special,
        "tokenizer.json": tokenizer_json(model_config.vocab_size),
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
    (folder / "chat_template.jinja").write_text(to_jinja(template), "utf-8")
    shutil.copyfile(BUNDLED_VOCAB_FILE, folder / BUNDLED_VOCAB_FILE.name)


def _cast(name: str, stored: Stored, dtype: torch.dtype) -> Stored:
    if stored.dtype == dtype:
        return stored

    def pieces() -> list[Tensor]:
        return [round_to(name, x, dtype) for x in stored.pieces()]

    return Stored(stored.shape, dtype, pieces)


def _write_weights(folder: Path, tensors: Mapping[str, Stored]) -> None:
    shards: list[dict[str, Spec]] = [{}]
    size = total = 0
    for name, stored in tensors.items():
        spec = Spec(stored.shape, stored.dtype)
        num_bytes = spec.numel * spec.dtype.itemsize
        if shards[-1] and size + num_bytes > LARGEST_SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size, total = size + num_bytes, total + num_bytes
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for name, specs in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            write_file(
                file,
                specs,
                lambda n: tensors[n].pieces() if tensors[n].shape else tensors[n].whole(),
                is_safetensors=True,
                metadata={"format": "pt"},
            )
    if len(shards) > 1:
        places = {n: name for name, specs in zip(names, shards, strict=True) for n in specs}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")


def is_folder(path: Path) -> bool:
    """Whether a path is the folder of a Hugging Face model, of RWKV-7 or another."""
    return (path / CONFIG).is_file() and "model_type" in _read_json(path / CONFIG)


def read(folder: Path) -> dict[str, Stored]:
    """The official tensors of a folder in the native layout or in fla's, mapped.

    Raises:
        CheckpointError: a file is missing or damaged, the model is another, the weights are in
            another form, or they are not those that the config tells of.
    """
    config = _read_json(folder / CONFIG)
    kind = str(config.get("model_type"))
    if kind.lower() != "rwkv7":
        raise CheckpointError(
            f"{folder} holds a model of the type {kind[:80]!r}, and of folders those of 'rwkv7' "
            "alone can be opened: give the official .pth"
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised: give the model that it was made of")
    tensors: dict[str, Tensor] = {}
    for name in _list_weights(folder):
        tensors |= _map_shard(folder / name)
    if config.get("embedding_layer_norm_fused"):
        raise CheckpointError(
            f"{folder} has blocks.0.ln0 folded into its embedding, which cannot be taken out: give "
            "the official file"
        )
    for key, value in ARITHMETIC.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(
                f"{folder}: {CONFIG} says {key} {str(config[key])[:80]}, and RWKV-7 is computed "
                f"with {value}: give the official .pth"
            )
    layout = find_layout(tensors) or NATIVE
    found = sort_official(layout.to_official(all_mapped(tensors), 0, folder))
    _require_as_configured(folder, config, found)
    return found


def _map_shard(path: Path) -> dict[str, Tensor]:
    if (kind := recognise(path)) is not SAFETENSORS:
        raise CheckpointError(f"{path} is {kind.what}: {kind.advice}")
    with damage_in_one_line(path):
        return map_safetensors(path)


def _require_as_configured(
    folder: Path, config: Mapping[str, Any], official: Mapping[str, Stored]
) -> None:
    """Sees that weights are of the sizes in the config, as those of two models are not."""

    def size(name: str, dim: int) -> int | None:
        return dict(enumerate(official[name].shape)).get(dim) if name in official else None

    found = {
        "num_hidden_layers": len({name.split(".")[1] for name in official if "blocks." in name}),
        "vocab_size": size("emb.weight", 0),
        "hidden_size": size("emb.weight", 1),
        "intermediate_size": size("blocks.0.ffn.key.weight", 0),
        "head_dim": size("blocks.0.att.r_k", 1),
        "head_size": size("blocks.0.att.r_k", 1),
    }
    for key, number in found.items():
        if None not in (number, said := config.get(key)) and said != number:
            raise CheckpointError(
                f"{folder}: {CONFIG} says {key} {str(said)[:80]}, and the weights have {number}: "
                "download both again"
            )


def sort_official(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors in the order of official files: embedding, blocks, head."""

    def place(name: str) -> tuple[int, int]:
        if name.startswith("blocks."):
            return 1, int(name.split(".")[1])
        return (0, 0) if name == "emb.weight" else (2, 0)

    return {name: found[name] for name in sorted(found, key=place)}


def _list_weights(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}: download it again")
    places = _read_json(folder / INDEX).get("weight_map")
    names = list(dict.fromkeys(places.values())) if isinstance(places, dict) else []
    for name in names:
        # a folder may come from anywhere, and nothing outside it is read
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {str(name)[:80]!r}: download it again")
    if not names:
        raise CheckpointError(f"{folder / INDEX} names no file: download it again")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG >> 20} MiB")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error)[:200]}") from error
    return found
