import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.checkpoint.older import LegacyAdapterHints, read_old_adapter
from rwkv_peft.checkpoint.pth import infer_model_config, read_weights
from rwkv_peft.checkpoint.state import read_state
from rwkv_peft.errors import CheckpointError

Change = Callable[[dict[str, Tensor]], Any]
KEY = "blocks.0.ffn.key.weight"


def put(name: str, value: Callable[[Tensor], Tensor], of: str = KEY) -> Change:
    return lambda weights: weights.update({name: value(weights[of])})


def drop(*starts: str) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [n for n in weights if n.startswith(starts)]:
            del weights[name]

    return change


def rename(old: str, new: str) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [n for n in weights if n.startswith(old)]:
            weights[new + name.removeprefix(old)] = weights.pop(name)

    return change


def quantise(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


# what a file holds -> what the one line says
CASES: dict[str, tuple[Change, str]] = {
    "sparse": (put(KEY, lambda x: x.to_sparse()), f"{KEY} is sparse"),
    "compressed": (put(KEY, lambda x: x.to_sparse_csr()), f"{KEY} is sparse"),
    "meta": (put(KEY, lambda x: x.to("meta")), f"{KEY} has no values"),
    "nested": (put(KEY, lambda x: torch.nested.nested_tensor([x.float()])), f"{KEY} is nested"),
    "quantised": (put(KEY, quantise), f"{KEY} is quantised"),
    "complex": (put(KEY, lambda x: x.to(torch.complex64)), f"{KEY} is complex64"),
    "conjugate": (put(KEY, lambda x: x.to(torch.complex64).conj()), f"{KEY} is lazy"),
    "bool": (put(KEY, lambda x: x > 0), f"{KEY} is bool"),
    "float8": (put(KEY, lambda x: x.to(torch.float8_e4m3fn)), f"{KEY} is float8_e4m3fn"),
    "integers": (put(KEY, lambda x: x.to(torch.int32)), f"{KEY} is int32"),
    "25 GB": (put("emb.weight", lambda x: x[0, :1].expand(98_000, 128_000)), "asks for 25,0"),
    "many views": (
        lambda weights: weights.update({f"x{i}": weights["emb.weight"] for i in range(99)}),
        "its tensors ask for",
    ),
    "hole": (drop("blocks.1."), "lacks layer 1"),
    "first layer": (drop("blocks.0."), "can be used"),
    "a layer far off": (rename("blocks.2.", "blocks.9999."), "lacks layer 2"),
    "a layer too far off": (rename("blocks.2.", "blocks.9999999."), "blocks.9999999.ln1"),
    "no layer": (rename("blocks.2.", "blocks.x."), "is of no layer"),
    "another spelling": (rename("blocks.2.", "blocks.02."), "is of no layer"),
    "Arabic digits": (rename("blocks.2.", "blocks.٢."), "is no name of a tensor"),
    "no heads": (put("blocks.0.att.r_k", lambda x: x.new_zeros(0, 64)), "0 heads"),
    "scalar": (put("blocks.0.att.r_k", lambda x: x[0, 0]), r"shape \(\)"),
    "empty": (put("blocks.0.ffn.x_k", lambda x: x[:0], "blocks.0.ffn.x_k"), r"\(0, 1, 128\)"),
    "half a state": (put("blocks.0.att.time_state", lambda x: x.new_zeros(2, 64, 64)), "missing"),
    "a state of more": (put("blocks.0.att.x_state", lambda x: x.new_zeros(2)), "unexpected"),
    "a name of a terminal": (put("a\x1b[2J", lambda x: x), "no name of a tensor"),
    "a long name": (put("a" * 9999, lambda x: x), "no name of a tensor"),
    "a number as name": (lambda weights: weights.update({5: weights[KEY]}), "no name"),  # type: ignore[dict-item]
    "other things": (lambda weights: weights.update(x=5), "other things than tensors"),  # type: ignore[call-overload]
}


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested|quantize).*")
@pytest.mark.parametrize("case", CASES)
def test_what_no_model_holds_is_refused_in_one_line(
    case: str,
    make_model_file: Callable[..., Path],
    tmp_path: Path,
    cli: Callable[..., SimpleNamespace],
) -> None:
    weights = dict(torch.load(make_model_file(n_layer=3)))
    change, message = CASES[case]
    change(weights)
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        infer_model_config(read_weights(tmp_path / "bad.pth"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    done = cli("generate", tmp_path / "bad.pth", "--prompt", "x")
    assert (done.code, done.err.count("\n"), done.out) == (2, 1, "")


def test_all_that_is_wrong_is_in_one_line(tmp_path: Path) -> None:
    weights = {
        "a": torch.zeros(3).bool(),
        "b": torch.zeros(3).to_sparse(),
        "blocks.y.c": torch.ones(1),
    }
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(
        CheckpointError, match=r"a is bool; b is sparse; blocks\.y\.c is of no layer"
    ):
        read_weights(tmp_path / "bad.pth")


@pytest.mark.parametrize("version", ["x050", "x051", "x052", "x060"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 64)])
def test_decays_of_no_head_are_refused(
    version: str, shape: tuple[int, ...], make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    ranks = {"maa": 32, "decay": 64} if version == "x060" else {}
    weights = dict(torch.load(make_model_file(version=version, ranks=ranks)))
    changed = [n for n in weights if n.endswith(("time_decay", "time_faaaa", "time_first"))]
    weights |= {name: torch.zeros(shape) for name in changed}
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError):
        infer_model_config(read_weights(tmp_path / "bad.pth"))


def test_states_and_old_adapters_pass_the_same_check(
    model_file: Path, tmp_path: Path, cli: Callable[..., SimpleNamespace]
) -> None:
    state = {f"blocks.{i}.att.time_state": torch.zeros(2, 64, 64).bool() for i in range(2)}
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="time_state is bool"):
        read_state(tmp_path / "state.pth", infer_model_config(read_weights(model_file)))
    adapter = {
        "blocks.x.att.key.lora_A": torch.zeros(2, 4),
        "blocks.x.att.key.lora_B": torch.ones(4, 2),
    }
    torch.save(adapter, tmp_path / "adapter.pth")
    with pytest.raises(CheckpointError, match="is of no layer"):
        read_old_adapter(tmp_path / "adapter.pth", LegacyAdapterHints(32))
    half = {"blocks.1.att.time_state": torch.zeros(2, 64, 64)}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="no state of this model"):
        read_state(tmp_path / "half.pth", infer_model_config(read_weights(model_file)))


def test_tied_weights_parameters_and_transposed_ones_are_read(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    given = {"one": x, "same": x, "across": x.t(), "trained": torch.nn.Parameter(x[:2].clone())}
    torch.save(given, tmp_path / "tied.pth")
    found = read_weights(tmp_path / "tied.pth")
    assert list(found) == list(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert not any(value.requires_grad for value in found.values())


def test_old_files_do_not_ask_for_more_than_they_hold(tmp_path: Path) -> None:
    weights = {"x": torch.zeros(1).expand(100_000, 1000)}
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x \(100000, 1000\) asks for 400,000,000 bytes, 4"):
        read_weights(tmp_path / "old.pth")


def test_a_compressed_file_says_how_to_write_it_anew(model_file: Path, tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(model_file) as old,
        zipfile.ZipFile(tmp_path / "OLD.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(
        CheckpointError, match=r"torch\.save\(torch\.load\('OLD\.pth'\), 'NEW\.pth'\)"
    ):
        read_weights(tmp_path / "OLD.pth")
    # what the message says works
    torch.save(torch.load(tmp_path / "OLD.pth"), tmp_path / "NEW.pth")
    found, wanted = read_weights(tmp_path / "NEW.pth"), read_weights(model_file)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
