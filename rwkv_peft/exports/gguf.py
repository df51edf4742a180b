"""GGUF, for llama.cpp and what is built on it: Ollama, LM Studio, koboldcpp.

Source of names, keys and shapes: llama.cpp, `conversion/rwkv.py` and `src/models/rwkv6.cpp`,
`rwkv7.cpp`; the file itself is written and read by the `gguf` package.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rwkv_peft.checkpoint.stream import as_bytes, is_finite, round_to
from rwkv_peft.data.templates import Template
from rwkv_peft.data.tokenizer import EOD
from rwkv_peft.errors import CheckpointError
from rwkv_peft.exports.layout import FLAT, SAME, TRANSPOSED, VECTOR, Form, Layout, Rule, rule
from rwkv_peft.exports.stored import Stored, mapped
from rwkv_peft.exports.texts import END_OF_TEXT, iterate_words, to_jinja
from rwkv_peft.methods.merge import row_slices
from rwkv_peft.models.config import ModelConfig

if TYPE_CHECKING:
    import gguf

# every so many layers llama.cpp can halve the stream of RWKV-6, so that products in fp16 hold it;
# what is added to the stream is divided by as much. It makes the norms' epsilon count more, and so
# is left out where numbers are stored that need no such care
RESCALE_EVERY, NEED_NO_RESCALE = 6, ("fp32", "bf16")
# RWKV is not limited in length; the number that llama.cpp's own files have
CONTEXT = 1048576
EPS = 1e-5


def _scale(every: int) -> Form:
    """Divided by 2 for each so many layers before it."""
    if not every:
        return SAME
    return Form(
        lambda xs, i: xs[0] / 2 ** (i // every),
        lambda x, i, n: (x * 2 ** (i // every),),
        by_rows=True,
    )


def _stack(*shape: int) -> Form:
    """Several vectors (1, 1, D) as one tensor of this shape and D."""
    return Form(
        lambda xs, i: torch.cat([x.reshape(1, -1) for x in xs]).view(*shape, -1),
        lambda x, i, n: tuple(row.view(1, 1, -1) for row in x.view(shape[0], -1)),
    )


_OUTER = (
    rule("emb.weight", "token_embd.weight"),
    rule("head.weight", "output.weight"),
    *(rule(f"ln_out.{leaf}", f"output_norm.{leaf}") for leaf in ("weight", "bias")),
    *(rule(f"blocks.0.ln0.{leaf}", f"token_embd_norm.{leaf}") for leaf in ("weight", "bias")),
)


def _block(*names: tuple[str, str, Form]) -> tuple[Rule, ...]:
    return tuple(rule(f"blocks.{{i}}.{a}", f"blk.{{i}}.{b}", form) for a, b, form in names)


_NORMS = _block(
    *(
        (f"{norm}.{leaf}", f"{foreign}.{leaf}", SAME)
        for norm, foreign in (
            ("ln1", "attn_norm"), ("ln2", "attn_norm_2"), ("att.ln_x", "time_mix_ln")
        )
        for leaf in ("weight", "bias")
    )
)  # fmt: skip
_PROJECTIONS = _block(
    ("att.receptance.weight", "time_mix_receptance.weight", SAME),
    ("att.key.weight", "time_mix_key.weight", SAME),
    ("att.value.weight", "time_mix_value.weight", SAME),
    ("ffn.key.weight", "channel_mix_key.weight", SAME),
)
_FUSED = "blk.{i}.time_mix_lerp_fused.weight"
_RWKV7 = Layout(
    (
        *_OUTER,
        *_NORMS,
        *_PROJECTIONS,
        *_block(
            ("att.output.weight", "time_mix_output.weight", SAME),
            ("ffn.value.weight", "channel_mix_value.weight", SAME),
            ("ffn.x_k", "channel_mix_lerp_k.weight", VECTOR),
            ("att.k_k", "time_mix_k_k.weight", VECTOR),
            ("att.k_a", "time_mix_k_a.weight", VECTOR),
            ("att.r_k", "time_mix_r_k.weight", FLAT),
            *((f"att.{x}0", f"time_mix_{x}0.weight", VECTOR) for x in "wav"),
            *((f"att.{x}{n}", f"time_mix_{x}{n}.weight", TRANSPOSED) for x in "wavg" for n in "12"),
        ),
        Rule(tuple(f"blocks.{{i}}.att.x_{x}" for x in "rwkvag"), _FUSED, _stack(6, 1, 1)),
        # the first layer's are asked for, and nothing computes with them
        *(
            Rule((f"blocks.0.att.a{n}",), f"blk.0.time_mix_v{n}.weight", form, is_copy=True)
            for n, form in zip("012", (VECTOR, TRANSPOSED, TRANSPOSED), strict=True)
        ),
    ),
    prefix=None,
    unread=frozenset(f"blocks.0.att.v{n}" for n in "012"),
)


def _rwkv6(rescale_every: int) -> Layout:
    return Layout(
        (
            *_OUTER,
            *_NORMS,
            *_PROJECTIONS,
            *_block(
                ("att.gate.weight", "time_mix_gate.weight", SAME),
                ("att.output.weight", "time_mix_output.weight", _scale(rescale_every)),
                ("ffn.receptance.weight", "channel_mix_receptance.weight", SAME),
                ("ffn.value.weight", "channel_mix_value.weight", _scale(rescale_every)),
                ("ffn.time_maa_k", "channel_mix_lerp_k.weight", VECTOR),
                ("ffn.time_maa_r", "channel_mix_lerp_r.weight", VECTOR),
                ("att.time_maa_x", "time_mix_lerp_x.weight", VECTOR),
                ("att.time_maa_w1", "time_mix_w1.weight", TRANSPOSED),
                ("att.time_maa_w2", "time_mix_w2.weight", TRANSPOSED),
                ("att.time_faaaa", "time_mix_first.weight", SAME),
                ("att.time_decay", "time_mix_decay.weight", VECTOR),
                ("att.time_decay_w1", "time_mix_decay_w1.weight", TRANSPOSED),
                ("att.time_decay_w2", "time_mix_decay_w2.weight", TRANSPOSED),
            ),
            Rule(tuple(f"blocks.{{i}}.att.time_maa_{x}" for x in "wkvrg"), _FUSED, _stack(5, 1, 1)),
        ),
        prefix=None,
    )


def layout_of(version: str, rescale_every: int = 0) -> Layout:
    """The layout of a version."""
    return _RWKV7 if version == "x070" else _rwkv6(rescale_every)


_ARCHITECTURES = {"x070": "rwkv7", "x060": "rwkv6"}
# ends of the matrices that are stored in the type asked for; all else is float32, as in
# llama.cpp's own files
_MATRICES = tuple(
    f"{name}.weight"
    for name in (
        "token_embd", "output", "receptance", "key", "value", "gate", "time_mix_output",
    )
)  # fmt: skip
# --dtype -> the type's name in the gguf package; those that its writer can quantise to
TYPES = {
    "fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0",
    "q4_1": "Q4_1", "q4_0": "Q4_0",
}  # fmt: skip
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# in types of 4 and 5 bits, both are stored in this one
_ENDS, _TYPE_OF_ENDS = ("token_embd.weight", "output.weight"), "Q8_0"


def write(
    file: IO[bytes],
    official: Mapping[str, Stored],
    model_config: ModelConfig,
    dtype: str,
    name: str,
    template: Template,
) -> None:
    """Writes a model, its tensors one at a time.

    Args:
        dtype: of the matrices, a key of `TYPES`.
        name: of the model, which programs show.
    Raises:
        CheckpointError: a value does not fit the type, or is not finite.
    """
    import gguf

    rescale_every = 0 if dtype in NEED_NO_RESCALE else RESCALE_EVERY
    tensors = layout_of(model_config.version, rescale_every).to_foreign(official)
    types = {name: _type_of(name, TYPES[dtype]) for name in tensors}
    writer = gguf.GGUFWriter(None, _ARCHITECTURES[model_config.version])
    writer.add_name(name)
    _add_sizes(writer, model_config, dtype)
    if model_config.version == "x060":
        writer.add_rescale_every_n_layers(rescale_every)
    _add_vocabulary(writer, model_config.vocab_size)
    writer.add_chat_template(to_jinja(template))
    for foreign, stored in tensors.items():
        kind = gguf.GGMLQuantizationType[types[foreign]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if stored.shape[-1] % block:
            raise CheckpointError(
                f"{foreign} has rows of {stored.shape[-1]}, and --dtype {dtype} is for multiples "
                f"of {block}: use --dtype fp16"
            )
        num_bytes = torch.Size(stored.shape).numel() // block * size
        writer.add_tensor_info(foreign, stored.shape, np.dtype(np.float16), num_bytes, kind)
    # the writer would open a file by its name, and this one is not yet whole
    writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())
    for foreign, stored in tensors.items():
        start = file.tell()
        for piece in stored.pieces():
            file.write(_encode(foreign, piece, types[foreign]))
        writer.write_padding(file, file.tell() - start)


def read(path: str | Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The official tensors of a GGUF file of RWKV-6 or 7, mapped, and its other fields by key.

    Raises:
        CheckpointError: it holds another model.
    """
    import gguf

    # mapped so that what is written to it never reaches the file
    reader = gguf.GGUFReader(path, "c")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    kind = fields.get("general.architecture")
    version = next((v for v, name in _ARCHITECTURES.items() if name == kind), None)
    if version is None:
        raise CheckpointError(f"{path} holds a model of the kind {kind}, not rwkv6 or rwkv7")
    tensors = {x.name: _open(x) for x in reader.tensors}
    rescale_every = int(fields.get(f"{kind}.rescale_every_n_layers", 0))
    layout, head_size = layout_of(version, rescale_every), int(fields[f"{kind}.wkv.head_size"])
    return layout.to_official(tensors, head_size, path), fields


def _type_of(name: str, asked: str) -> str:
    if not name.endswith(_MATRICES):
        return "F32"
    return _TYPE_OF_ENDS if name in _ENDS and asked[:2] in ("Q4", "Q5") else asked


def _add_sizes(writer: "gguf.GGUFWriter", model_config: ModelConfig, dtype: str) -> None:
    import gguf

    ranks = model_config.ranks
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(model_config.n_embd)
    writer.add_block_count(model_config.n_layer)
    writer.add_feed_forward_length(model_config.dim_ffn)
    writer.add_layer_norm_eps(EPS)
    writer.add_wkv_head_size(model_config.head_size)
    # asked for, and not read
    writer.add_head_count(0)
    if model_config.version == "x070":
        writer.add_decay_lora_rank(ranks["w"])
        writer.add_iclr_lora_rank(ranks["a"])
        writer.add_value_residual_mix_lora_rank(ranks["v"])
        writer.add_gate_lora_rank(ranks["g"])
    else:
        writer.add_time_mix_extra_dim(ranks["maa"])
        writer.add_time_decay_extra_dim(ranks["decay"])
    kind = TYPES[dtype]
    name = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: "gguf.GGUFWriter", vocab_size: int) -> None:
    """The tokens as llama.cpp's tokenizer of RWKV takes them: the literal of each in Python.

    Token 0 alone ends a text. llama.cpp's own files make the blank line (261) end a turn too, and
    so cut an answer at its first one.
    """
    from gguf import TokenType

    words = list(iterate_words(vocab_size))
    texts = [
        repr(word)[2:-1] if word is not None else f"[PAD{i}]" for i, word in enumerate(words, 1)
    ]
    kinds = [TokenType.NORMAL if word is not None else TokenType.UNUSED for word in words]
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([END_OF_TEXT, *texts])
    writer.add_token_types([TokenType.CONTROL, *kinds])
    writer.add_bos_token_id(EOD)
    writer.add_eos_token_id(EOD)
    writer.add_add_bos_token(False)


def _encode(name: str, x: Tensor, kind: str) -> memoryview:
    if kind == "F16":
        return as_bytes(round_to(name, x, torch.float16))
    if not is_finite(x):
        raise CheckpointError(f"{name} holds NaN or infinity: nothing was written")
    if kind in _TORCH:
        return as_bytes(x.to(_TORCH[kind]))
    import gguf

    values = x.float().contiguous().numpy()
    return memoryview(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).reshape(-1))


def _open(found: "gguf.ReaderTensor") -> Stored:
    """A tensor of a file; quantised ones become float32 a few rows at a time."""
    import gguf

    shape = tuple(int(size) for size in reversed(found.shape))
    kind, raw = found.tensor_type.name, torch.from_numpy(np.asarray(found.data))
    if kind in _TORCH:
        return mapped(raw.view(_TORCH[kind]).view(shape))
    # a matrix with the bytes of each row
    raw = raw.view(shape[0], -1)

    def pieces() -> Iterator[Tensor]:
        decode = partial(gguf.quants.dequantize, qtype=found.tensor_type)
        return (torch.from_numpy(decode(raw[rows].numpy())) for rows in row_slices(shape))

    return Stored(shape, torch.float32, pieces)
