"""What a merge says of itself, and the memory that it takes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.adapter import write_adapter
from rwkv_peft.checkpoint.compare import Comparison, draw_sample
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.checkpoint.report import MergeReport
from rwkv_peft.checkpoint.state import write_state
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.state import LearnedStates
from tests.checkpoint.test_compare import differences

SIXTH: dict[str, Any] = {"version": "x060", "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448}
VERSIONS: dict[str, dict[str, Any]] = {
    "5.2": {"version": "x052", "ranks": {}, "dim_ffn": 448},
    "6": SIXTH,
    "7": {},
}
# methods with a fast form and without, one that changes norms, one beside trained parts
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4}),
    "dora": ("lora", {"r": 4, "use_dora": True}),
    "everything": ("lora", {"r": 4, "target_modules": ["key", "head", "emb"]}),
    "miss": ("miss", {"r": 12}),
    "mini": ("miss", {"r": 8, "init_weights": "mini", "mini_r": 8}),
    "bat": ("miss", {"r": 8, "init_weights": "bat"}),
    "ln_tuning": ("ln_tuning", {}),
}


def make_adapter(
    base: Path, folder: Path, method: str, options: dict[str, Any], *, size: float = 0.05
) -> Path:
    """An adapter drawn at random, as if trained."""
    model = rwkv_peft.load_model(base)
    torch.manual_seed(1)
    trained = attach(model, method, options, train_parts=["ln_x"] if method == "miss" else [])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += torch.randn(parameter.shape, generator=generator) * size
    write_adapter(folder, trained, trained, base=base)
    return folder


def make_state(base: Path, path: Path) -> Path:
    states = LearnedStates(rwkv_peft.load_model(base))
    generator = torch.Generator().manual_seed(5)
    write_state(path, {n: torch.randn(p.shape, generator=generator) for n, p in states.items()})
    return path


def logits(model: Any) -> list[Tensor]:
    return [model(torch.tensor([row]))[0][0].detach() for row in draw_sample(320, 64).rows]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("dtype", ["keep", "fp16", "fp32"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_comparison_is_that_of_the_two_models_in_float32(
    version: str,
    name: str,
    dtype: Any,
    make_model_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = make_model_file(**VERSIONS[version])
    adapter = make_adapter(base, tmp_path / "adapter", *METHODS[name])
    report = rwkv_peft.merge(base, adapter, tmp_path / "merged.pth", dtype=dtype)
    assert report.comparison is not None and report.comparison.tokens == 64
    wanted = logits(rwkv_peft.load_model(base, adapter=adapter))
    found = logits(rwkv_peft.load_model(tmp_path / "merged.pth"))
    expected = differences(wanted, found)
    # the logits of two sums of float32, in another order, are this far apart
    for key, value in expected.items():
        assert getattr(report.comparison, key) == pytest.approx(value, rel=0.02, abs=1e-4), key
    if dtype == "fp32":
        # about a hundred roundings of float32 deep; the norms of single heads enlarge some
        largest = torch.cat(wanted).abs().max().item()
        assert report.comparison.mean_difference < 100 * torch.finfo(torch.float32).eps * largest
        assert report.comparison.kl < 1e-8
        assert report.comparison.top1_agreement == 1
    else:
        assert report.comparison.max_difference > 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_states_and_weighted_adapters_are_compared_with_what_they_stand_for(
    version: str, make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_file(**VERSIONS[version])
    one = make_adapter(base, tmp_path / "one", "lora", {"r": 4})
    other = make_adapter(base, tmp_path / "other", "miss", {"r": 8})
    state = make_state(base, tmp_path / "state.pth")
    given, weights = [one, other, state], [0.5, -0.25, 2.0]
    exact = rwkv_peft.merge(
        base, given, tmp_path / "exact.pth", weights=weights, dtype="fp32"
    ).comparison
    assert exact is not None and exact.max_difference < 1e-4 and exact.kl < 1e-8
    kept = rwkv_peft.merge(base, given, tmp_path / "kept.pth", weights=weights).comparison
    assert kept is not None
    # the exact file is the adapter model: independent of how that is run beside the merge
    wanted = logits(rwkv_peft.load_model(tmp_path / "exact.pth"))
    expected = differences(wanted, logits(rwkv_peft.load_model(tmp_path / "kept.pth")))
    for key, value in expected.items():
        assert getattr(kept, key) == pytest.approx(value, rel=0.02, abs=1e-4), key
    # and it has base + sum of weight times change
    tensors, merged = read_weights(base), read_weights(tmp_path / "exact.pth")
    name = "blocks.1.att.key.weight"
    total = tensors[name].double()
    for adapter, weight in ((one, 0.5), (other, -0.25)):
        rwkv_peft.merge(
            base, adapter, tmp_path / "alone.pth", dtype="fp32", compare=0, overwrite=True
        )
        total += weight * (read_weights(tmp_path / "alone.pth")[name].double() - tensors[name])
    torch.testing.assert_close(merged[name].double(), total, rtol=0, atol=1e-6)
    states = read_weights(state)
    assert all(torch.equal(merged[n], 2 * x) for n, x in states.items())


def test_a_state_alone_changes_the_answers_of_the_file_and_of_the_model_alike(
    model_file: Path, tmp_path: Path
) -> None:
    state = make_state(model_file, tmp_path / "state.pth")
    report = rwkv_peft.merge(model_file, state, tmp_path / "merged.pth")
    assert report.comparison is not None and report.comparison.max_difference == 0
    assert "no state from an RWKV-7 file" in report.recommendation()
    # the adapter merged into that file keeps the state, in the file and in the comparison
    adapter = make_adapter(tmp_path / "merged.pth", tmp_path / "adapter", "lora", {"r": 4})
    again = rwkv_peft.merge(tmp_path / "merged.pth", adapter, tmp_path / "both.pth", dtype="fp32")
    assert again.comparison is not None and again.comparison.max_difference < 1e-4
    assert set(read_weights(tmp_path / "both.pth")) > set(read_weights(state))


def test_the_command_prints_three_lines_and_writes_them(
    cli: Callable[..., SimpleNamespace],
    model_file: Path,
    make_data_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter = make_adapter(model_file, tmp_path / "adapter", "lora", {"r": 4}, size=0.3)
    files = ("--base_model", model_file, "--adapter", adapter, "--output", tmp_path / "m.pth")
    rows = make_data_file([f"{i} held-out 行 " * 40 for i in range(30)], "held_out.jsonl")
    done = cli("merge", *files, "--data_file", rows, "--compare", 100)
    assert done.code == 0, done.err
    _, rounding, comparison, recommendation = done.out.splitlines()
    assert rounding.startswith("rounding: 12 tensors changed; storing them as bfloat16 loses ")
    assert comparison.startswith(f"comparison: on 100 tokens of {rows}, logits differ by ")
    assert recommendation == "recommendation: use the merged file; it holds what was learned"
    report = json.loads((tmp_path / "merge_report.json").read_text(encoding="utf-8"))
    assert report["comparison"]["tokens"] == 100
    assert f"KL {report['comparison']['kl']:.2g} nats" in comparison
    assert f"same at {report['comparison']['top1_agreement']:.1%}" in comparison
    assert "exists: choose another name" in cli("merge", *files, "--compare", 0).err
    off = cli("merge", *files, "--compare", 0, "--overwrite", 1)
    trained = "; 12 merged tensors are what their layers computed as they were trained, to "
    assert off.out.splitlines()[2].startswith(f"comparison: not made{trained}")
    report = json.loads((tmp_path / "merge_report.json").read_text(encoding="utf-8"))
    assert report["comparison"] is None
    assert cli("merge", *files, "--compare", 0, "--data_file", rows).code == 2


@pytest.mark.parametrize(
    ("loss", "loss_fp16", "kl", "agreement", "advice"),
    [
        (0.01, 0.01, 1e-4, 1.0, "use the merged file"),
        (0.40, 0.05, 1e-4, 1.0, "fp16, which loses 5.00%, .*; on the text compared, the answers"),
        (0.40, 0.05, 0.50, 1.0, "fp16, which loses 5.00%, or use the adapter unmerged$"),
        (0.40, 0.39, None, None, "use the adapter unmerged, or merge with --dtype fp32$"),
        (0.01, 0.01, 0.50, 1.0, "use the adapter unmerged"),
        (0.01, 0.01, 1e-4, 0.8, "use the adapter unmerged"),
        (0.01, 0.01, float("nan"), 1.0, "use the adapter unmerged"),
    ],
)
def test_the_recommendation_follows_from_rounding_and_answers(
    loss: float, loss_fp16: float, kl: float | None, agreement: float | None, advice: str
) -> None:
    comparison = None
    if kl is not None and agreement is not None:
        comparison = Comparison("a text", 64, 0.1, 0.01, kl, agreement)
    report = MergeReport("b", ["a"], [1.0], "o", "bfloat16", "x070", loss, loss_fp16, {"n": loss})
    report.comparison = comparison
    assert re.search(advice, report.recommendation())


def test_values_that_a_file_cannot_hold_leave_the_previous_file(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_file(dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", "lora", {"r": 4}, size=500.0)
    (tmp_path / "merged.pth").write_bytes(b"previous")
    with pytest.raises(CheckpointError, match="does not fit into fp16"):
        rwkv_peft.merge(base, adapter, tmp_path / "merged.pth", dtype="fp16", overwrite=True)
    # finite factors of which the product is not
    broken = make_adapter(base, tmp_path / "broken", "lora", {"r": 4}, size=1e30)
    with pytest.raises(CheckpointError, match=r"att\.receptance\.weight .* not finite"):
        rwkv_peft.merge(base, broken, tmp_path / "merged.pth", overwrite=True)
    assert (tmp_path / "merged.pth").read_bytes() == b"previous"
    assert not list(tmp_path.glob(".*.tmp"))
