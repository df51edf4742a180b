"""Tunes on a base in 8 or 4 bits, saved, loaded, merged and opened by the official runtime."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.adapter import load_adapter, read_adapter
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.checkpoint.state import load_state
from rwkv_peft.models import build
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import Storage
from tests.quant.test_linear import IN_RUNS

TOKENS = list(range(1, 49))
VERSIONS: dict[str, dict[str, Any]] = {
    "x052": {"ranks": {}, "dim_ffn": 448},
    "x060": {"ranks": {"maa": 32, "decay": 64}, "dim_ffn": 448},
    "x070": {},
}


def stored_model(base: Path, quant: str, has_head: bool = False) -> RWKV:
    """A model as training with `--quant` has it."""
    weights = read_weights(base)
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights, storage=Storage(quant, torch.float32, has_head))
    return model


@torch.no_grad()
def logits(model: RWKV) -> Tensor:
    found: Tensor = model.eval()(torch.tensor([TOKENS]))[0][0]
    return found


@pytest.fixture
def tune(
    cli: Callable[..., SimpleNamespace], data_file: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Trains some steps on the command line and gives the folder of the run."""

    def run(base: Path, quant: str, *flags: object) -> Path:
        folder = tmp_path / f"run-{quant}"
        common = {
            "proj_dir": folder, "quant": quant, "epoch_count": 2, "micro_bsz": 4, "ctx_len": 48,
            "lr_init": 1e-2, "precision": "fp32", "accelerator": "cpu", "random_seed": 0,
            "data_cache": tmp_path / "cache",
        }  # fmt: skip
        given = [x for name, value in common.items() for x in (f"--{name}", value)]
        done = cli("train", base, data_file, *given, *flags)
        assert done.code == 0, done.err
        return folder

    return run


@pytest.mark.parametrize("version", VERSIONS)
def test_the_official_runtime_has_the_adapters_logits_on_the_base_as_it_was_stored(
    version: str,
    tune: Callable[..., Path],
    cli: Callable[..., SimpleNamespace],
    make_model_file: Callable[..., Path],
    official_logits_of: Callable[..., list[Tensor]],
    tmp_path: Path,
) -> None:
    base = make_model_file(version=version, dtype=torch.float32, **VERSIONS[version])
    wanted: dict[Path, Tensor] = {}
    for quant in IN_RUNS:
        run = tune(base, quant, "--peft", "lora", "--peft_config", '{"r": 4}')
        adapter = run / "rwkv-1-adapter"
        stored, dense = stored_model(base, quant), rwkv_peft.load_model(base)
        before = logits(stored), logits(dense)
        for model in (stored, dense):
            load_adapter(model, read_adapter(adapter), adapter)
        after = logits(stored), logits(dense)
        wanted[run / "rwkv-1.pth"] = after[0]
        for merge_base, found in zip(("trained", "original"), after, strict=True):
            output = tmp_path / f"{quant}-{merge_base}.pth"
            merged = cli(
                "merge", "--base_model", base, "--adapter", adapter, "--output", output,
                "--merge_base", merge_base,
            )  # fmt: skip
            assert merged.code == 0, merged.err
            wanted[output] = found
        # what was learned, and what storing takes, are far more than the two may differ by
        for one, other in ((before[0], after[0]), (before[0], before[1]), after):
            assert (one - other).abs().max() > 1e-2
    official = official_logits_of(list(wanted), TOKENS, version)
    for (path, ours), theirs in zip(wanted.items(), official, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4, msg=path.name)


def test_the_official_runtime_has_a_states_logits_on_the_base_as_it_was_stored(
    tune: Callable[..., Path],
    cli: Callable[..., SimpleNamespace],
    make_model_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from rwkv.model import RWKV as Official

    base = make_model_file(dtype=torch.float32)
    run = tune(base, "nf4", "--peft", "state", "--lr_init", "0.3")
    state, merged = run / "rwkv-1.pth", tmp_path / "merged.pth"
    model = stored_model(base, "nf4")
    before = logits(model)
    load_state(model, state)
    wanted = logits(model)
    assert (wanted - before).abs().max() > 1e-2
    # of the file's note none is told, and it is no tensor to others
    assert torch.equal(logits(rwkv_peft.load_model(base, state=state)), wanted)
    saved = torch.load(state, weights_only=True)
    assert list(saved) == [f"blocks.{i}.att.time_state" for i in range(2)]
    done = cli("merge", "--base_model", base, "--adapter", state, "--output", merged)
    assert done.code == 0 and "nf4" in done.out, done.err
    official = Official(model=str(merged.with_suffix("")), strategy="cpu fp32")
    begin = official.generate_zero_state()
    for i in range(2):
        begin[i * 3 + 1] = saved[f"blocks.{i}.att.time_state"]
    theirs, _ = official.forward(TOKENS, begin, full_output=True)
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", IN_RUNS)
def test_a_stored_head_is_merged_as_it_was_trained(
    quant: str,
    tune: Callable[..., Path],
    cli: Callable[..., SimpleNamespace],
    make_model_file: Callable[..., Path],
    official_logits: Callable[..., Tensor],
) -> None:
    base = make_model_file(dtype=torch.float32)
    flags = ("--quant_head", 1, "--peft", "lora", "--peft_config", '{"r": 4}')
    run = tune(base, quant, *flags)
    adapter = run / "rwkv-1-adapter"
    model = stored_model(base, quant, has_head=True)
    assert model.head.weight.dtype in (torch.int8, torch.uint8)
    without = stored_model(base, quant)
    for x in (model, without):
        load_adapter(x, read_adapter(adapter), adapter)
    wanted = logits(model)
    assert (wanted - logits(without)).abs().max() > 1e-2
    assert torch.equal(logits(rwkv_peft.load_model(base, adapter=adapter)), wanted)
    official = official_logits(run / "rwkv-1.pth", TOKENS)
    torch.testing.assert_close(official, wanted, rtol=0, atol=1e-4)


def test_a_merge_after_products_of_fp8_has_the_weights_of_their_forward(
    tune: Callable[..., Path],
    cli: Callable[..., SimpleNamespace],
    make_model_file: Callable[..., Path],
    official_logits: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    base, output = make_model_file(dtype=torch.float32), tmp_path / "merged.pth"
    run = tune(base, "fp8", "--precision", "bf16", "--peft", "lora", "--peft_config", '{"r": 4}')
    adapter = run / "rwkv-1-adapter"
    done = cli("merge", "--base_model", base, "--adapter", adapter, "--output", output)
    assert done.code == 0, done.err
    # a dense model of the rounded weights, which rounds nothing else
    weights = read_weights(base)
    for name, x in weights.items():
        if name.startswith("blocks.") and name.endswith(".weight") and x.ndim == 2:
            scale = x.float().abs().amax(1, keepdim=True) / 448
            weights[name] = ((x / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16().float()
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights)
    load_adapter(model, read_adapter(adapter), adapter)
    torch.testing.assert_close(official_logits(output, TOKENS), logits(model), rtol=0, atol=1e-4)
