"""Exported files in the programs that they are for; docs/exports.md says what was read by which."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.api import load_model
from rwkv_peft.assets import BASE_MODEL
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.checkpoint.state import write_state
from rwkv_peft.cli.main import main
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.exports.formats import FORMATS
from tests.exports.readers import RwkvCpp, fla_models, web_rwkv_logits
from tests.exports.test_round_trips import MODELS, RWKV5, RWKV6, export

TOKENS = [66, 300, 5, 17, 42, 300, 7, 7, 261, 9, 101, 33]


def logits_of(path: Path, state: Path | None = None) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, op="reference", state=state)(torch.tensor([TOKENS]))[0][0]


@pytest.mark.parametrize("version", [{"n_layer": 3}, RWKV6, RWKV5], ids=["x070", "x060", "x052"])
def test_the_rwkv_package_answers_as_the_model(
    make_model_file: Callable[..., Path],
    official_logits: Callable[..., torch.Tensor],
    tmp_path: Path,
    version: dict[str, Any],
) -> None:
    source = make_model_file(dtype=torch.float32, **version)
    exported = export(source, "pth", tmp_path / "exported.pth")
    found = official_logits(exported, TOKENS, version.get("version", "x070"))
    assert (found - logits_of(source)).abs().max() < 1e-4


def test_the_rwkv_package_takes_an_exported_state(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    from rwkv.model import RWKV

    source = make_model_file(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{i}.att.time_state": torch.randn(2, 64, 64, generator=generator) for i in range(2)
    }
    write_state(tmp_path / "trained.pth", tensors)
    exported = export(tmp_path / "trained.pth", "pth", tmp_path / "exported.pth")
    held = torch.load(exported, weights_only=True)
    assert list(held) == list(tensors)
    model = RWKV(model=str(source.with_suffix("")), strategy="cpu fp32")
    state = model.generate_zero_state()
    for i in range(2):
        state[i * 3 + 1] = held[f"blocks.{i}.att.time_state"].float()
    found, _ = model.forward(TOKENS, state, full_output=True)
    assert (found - logits_of(source, exported)).abs().max() < 1e-3
    assert (logits_of(source, exported) - logits_of(source)).abs().max() > 0.1


def test_transformers_runs_a_folder_of_fla_s_layout_on_the_cpu(tmp_path: Path) -> None:
    modeling = pytest.importorskip("rwkv7_hf.modeling_rwkv7")
    folder = export(BASE_MODEL, "hf-fla", tmp_path / "folder", "--dtype", "fp32")
    model, report = modeling.RWKV7ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.tensor([Tokenizer(5120).encode("User: hi, what is the moon?\n\nAssistant:")])
    with torch.no_grad():
        found = model(tokens, return_dict=True).logits
        wanted = load_model(BASE_MODEL, op="reference")(tokens)[0]
    assert (found - wanted).abs().max() < 1e-4


def test_fla_s_own_class_takes_every_tensor_of_a_folder_in_its_layout(tmp_path: Path) -> None:
    """Its forward needs a GPU: names, shapes and values are compared on the CPU."""
    models = fla_models()
    folder = export(BASE_MODEL, "hf-fla", tmp_path / "folder", "--dtype", "fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.RWKV7ForCausalLM(models.RWKV7Config.from_pretrained(folder))
        loaded = models.RWKV7ForCausalLM.from_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    model.load_state_dict(held, strict=True)
    wanted = read_weights(BASE_MODEL)
    for own in (model, loaded):
        attention = own.model.layers[1].attn
        assert torch.equal(
            attention.r_proj.weight, wanted["blocks.1.att.receptance.weight"].float()
        )
        assert torch.equal(attention.w_lora.lora[0].weight, wanted["blocks.1.att.w1"].float().t())
        assert torch.equal(
            attention.v_lora.lora[2].bias, wanted["blocks.1.att.v0"].float().view(-1)
        )
        assert all(torch.equal(x, held[name]) for name, x in own.state_dict().items())


def test_the_native_layout_without_its_prefix_is_an_official_file_to_transformers(
    tmp_path: Path,
) -> None:
    """No release of transformers has the layout: rwkv7-hf converts it and computes."""
    converter = pytest.importorskip("rwkv7_hf.converter")
    modeling = pytest.importorskip("rwkv7_hf.modeling_rwkv7")
    folder = export(BASE_MODEL, "hf", tmp_path / "folder", "--dtype", "fp32")
    held = load_file(folder / "model.safetensors")
    assert {name for name in held if not name.startswith("model.")} == {"head.weight"}
    official = {name.removeprefix("model."): x for name, x in held.items()}
    torch.save(official, tmp_path / "official.pth")
    tokens = torch.tensor([Tokenizer(5120).encode("User: hi, what is the moon?\n\nAssistant:")])
    line = ["--input", str(tmp_path / "official.pth"), "--output", str(tmp_path / "made")]
    assert converter.main([*line, "--precision", "fp32"]) == 0
    model, report = modeling.RWKV7ForCausalLM.from_pretrained(
        tmp_path / "made", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        found = model(tokens, return_dict=True).logits
        wanted = load_model(BASE_MODEL, op="reference")(tokens)[0]
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize("version", FORMATS["bin"].versions)
def test_rwkv_cpp_answers_as_the_model(
    make_model_file: Callable[..., Path],
    tmp_path: Path,
    version: str,
    dtype: str,
    tolerance: float,
) -> None:
    source = make_model_file(dtype=torch.float16, **MODELS[version])
    exported = export(source, "bin", tmp_path / "exported.bin", "--dtype", dtype)
    error = (RwkvCpp(exported).logits(TOKENS) - logits_of(source)).abs().amax(-1)
    if version == "x052":
        # it adds 1e-5 where RWKV-5 adds 64e-5 to the variance of a head, which is small at first
        error, tolerance = error[2:], max(tolerance, 1e-4)
    assert error.max() < tolerance


# as wide as its kernels need, which reach beyond a narrower layer; as deep as it halves the stream
WIDE = {"n_layer": 6, "n_embd": 256, "dim_att": 256, "dim_ffn": 896}


@pytest.mark.parametrize("version", [RWKV6, RWKV5], ids=["x060", "x052"])
def test_web_rwkv_answers_as_the_model(
    make_model_file: Callable[..., Path], tmp_path: Path, version: dict[str, Any]
) -> None:
    source = make_model_file(dtype=torch.float16, **(version | WIDE))
    found = web_rwkv_logits(export(source, "st", tmp_path / "exported.st"), TOKENS)
    wanted = logits_of(source)
    # what one step of fp16 in every weight does: it computes in fp16, so that each product has one
    weights, generator = read_weights(source), torch.Generator().manual_seed(0)
    steps = {
        n: x.float() * (1 + 2**-10 * torch.randn(x.shape, generator=generator))
        for n, x in weights.items()
    }
    write_weights(tmp_path / "steps.pth", steps)
    step = (logits_of(tmp_path / "steps.pth") - wanted).abs().max()
    assert (found - wanted).abs().max() < step < 0.1 * wanted.std()


def test_transformers_tokenizes_and_writes_turns_as_we_do(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from rwkv_peft.data.records import Turn
    from rwkv_peft.data.templates import TEMPLATES

    folder = export(BASE_MODEL, "hf", tmp_path / "folder")
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(5120)
    for text in (
        "User: hi\n\nAssistant: 你好 é😀  x",
        "<|rwkv_tokenizer_end_of_text|>\n\n\n a\r\n",
    ):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == 0 and len(theirs) == 5120
    turns = [("user", "a\n\nb \n"), ("assistant", "c\n\nd"), ("user", "e")]
    text = theirs.apply_chat_template(
        [{"role": role, "content": said} for role, said in turns],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == TEMPLATES["chat"].prompt([Turn(*turn) for turn in turns])


def test_ai00_s_files_have_the_names_shapes_and_values_that_web_rwkv_loads(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The table is of its `loader.rs`, `v6.rs` and `v7.rs`; it computes W x with W as (out, in)."""
    D, R = 128, 32
    source = make_model_file(dtype=torch.float16, n_layer=3)
    wanted, found = read_weights(source), load_file(export(source, "st", tmp_path / "7.st"))
    assert found.keys() == wanted.keys()
    assert {x.dtype for x in found.values()} == {torch.float16}
    for leaf in ("w1", "a1", "g1", "v1"):
        assert found[f"blocks.1.att.{leaf}"].shape == (R, D)
        assert torch.equal(found[f"blocks.1.att.{leaf}"], wanted[f"blocks.1.att.{leaf}"].t())
    for leaf in ("w2", "a2", "g2", "v2"):
        assert found[f"blocks.1.att.{leaf}"].shape == (D, R)
        assert torch.equal(found[f"blocks.1.att.{leaf}"], wanted[f"blocks.1.att.{leaf}"].t())
    for leaf in ("att.x_r", "att.w0", "att.r_k", "att.key.weight", "ffn.x_k", "ffn.value.weight"):
        assert torch.equal(found[f"blocks.1.{leaf}"], wanted[f"blocks.1.{leaf}"])

    source = make_model_file(dtype=torch.float16, **RWKV6)
    wanted, found = read_weights(source), load_file(export(source, "st", tmp_path / "6.st"))
    old = "blocks.0.att."
    assert not [name for name in found if "maa" in name or "faaaa" in name]
    assert torch.equal(found[f"{old}time_first"], wanted[f"{old}time_faaaa"])
    assert torch.equal(found[f"{old}time_mix_x"], wanted[f"{old}time_maa_x"])
    assert torch.equal(found[f"{old}time_mix_w"], wanted[f"{old}time_maa_w"])
    assert torch.equal(found["blocks.0.ffn.time_mix_k"], wanted["blocks.0.ffn.time_maa_k"])
    assert found[f"{old}time_mix_w1"].shape == (5 * 32, D)
    assert found[f"{old}time_mix_w2"].shape == (5, D, 32)
    assert found[f"{old}time_decay_w1"].shape == (64, D)
    for a, b in (("mix_w1", "maa_w1"), ("mix_w2", "maa_w2"), ("decay_w2", "decay_w2")):
        assert torch.equal(found[f"{old}time_{a}"], wanted[f"{old}time_{b}"].transpose(-1, -2))


def test_ai00_s_state_and_lora_give_the_model_that_was_trained(
    make_model_file: Callable[..., Path],
    make_data_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, run = make_model_file(dtype=torch.float16), tmp_path / "run"
    write_state(
        tmp_path / "s.pth", {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}
    )
    state = export(tmp_path / "s.pth", "st", tmp_path / "s.state")
    wanted = read_weights(tmp_path / "s.pth")
    for name, x in load_file(state).items():
        assert torch.equal(x, wanted[name].half().transpose(1, 2))

    train = ["train", str(base), str(make_data_file()), "--proj_dir", str(run)]
    options = ["--peft_config", '{"r": 4, "lora_alpha": 12}', "--precision", "fp32"]
    assert (
        main([*train, *options, "--epoch_count", "1", "--ctx_len", "32", "--lr_init", "1e-2"]) == 0
    )
    lora = export(run / "rwkv-0-adapter", "st", tmp_path / "lora.st", "--merge", "0")
    assert "alpha = 12" in capsys.readouterr().out
    held, weights = load_file(lora), read_weights(base)
    merged = {name: x.float().clone() for name, x in weights.items()}
    # as web-rwkv does: alpha / R times the product, where the first factor lies as (in, R)
    for name in (n for n in held if n.endswith(".lora.0")):
        a, b = held[name].float(), held[name.removesuffix("0") + "1"]
        assert a.shape[1] == 4
        merged[name.removesuffix(".lora.0") + ".weight"] += 12 / 4 * b.float() @ a.t()
    write_weights(tmp_path / "theirs.pth", merged)
    ours = load_model(base, adapter=run / "rwkv-0-adapter", op="reference")
    with torch.no_grad():
        wanted_logits = ours(torch.tensor([TOKENS]))[0][0]
    difference = (logits_of(tmp_path / "theirs.pth") - wanted_logits).abs().max()
    change = (logits_of(base) - wanted_logits).abs().max()
    assert difference < 0.01 * change
    # and back: a LoRA of Ai00 merges as the adapter did
    merge = ["merge", "--base_model", str(base), "--adapter", str(lora), "--lora_alpha", "12"]
    assert main([*merge, "--output", str(tmp_path / "back.pth"), "--dtype", "fp32"]) == 0
    assert (logits_of(tmp_path / "back.pth") - wanted_logits).abs().max() < 0.01 * change


def test_rwkv_cpp_s_file_is_as_its_format_says(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """By its `docs/FILE_FORMAT.md`, read here without the package's own reader."""
    source = make_model_file(dtype=torch.float16, n_layer=3)
    content = export(source, "bin", tmp_path / "out.bin").read_bytes()
    assert np.frombuffer(content, "<i4", 6).tolist() == [0x67676D66, 101, 320, 128, 3, 1]
    place, found = 24, {}
    while place < len(content):
        ndim, length, kind = np.frombuffer(content, "<i4", 3, place).tolist()
        shape = np.frombuffer(content, "<i4", ndim, place + 12).tolist()[::-1]
        place += 12 + 4 * ndim
        name = content[place : place + length].decode()
        dtype = np.dtype("<f2" if kind else "<f4")
        count = int(np.prod(shape))
        found[name] = np.frombuffer(content, dtype, count, place + length).reshape(shape)
        place += length + count * dtype.itemsize
    wanted = {name: x.float().numpy() for name, x in read_weights(source).items()}
    one = found["blocks.1.att.x_rwkvag"]
    assert one.shape == (6, 1, 128) and one.dtype == np.float32
    for row, leaf in zip(one, "rwkvag", strict=True):
        assert (row == wanted[f"blocks.1.att.x_{leaf}"][0]).all()
    assert (found["blocks.1.att.w1"] == wanted["blocks.1.att.w1"].T).all()
    assert found["blocks.1.att.w1"].dtype == found["emb.weight"].dtype == np.float16
    assert found["blocks.1.att.w0"].dtype == found["ln_out.bias"].dtype == np.float32
    assert (found["blocks.2.ffn.value.weight"] == wanted["blocks.2.ffn.value.weight"]).all()
