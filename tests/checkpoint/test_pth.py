import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import infer_model_config, read_weights, write_like, write_weights
from rwkv_peft.errors import CheckpointError


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was-here",)


def test_the_model_config_is_read_from_names_and_shapes(
    make_model_file: Callable[..., Path],
) -> None:
    ranks = {"w": 64, "a": 32, "v": 16, "g": 96}
    path = make_model_file(n_layer=3, ranks=ranks, dim_ffn=448, vocab_size=777)
    model_config = infer_model_config(read_weights(path))
    assert (model_config.version, model_config.n_layer, model_config.n_embd) == ("x070", 3, 128)
    assert (model_config.dim_ffn, model_config.vocab_size, model_config.n_head) == (448, 777, 2)
    assert (model_config.ranks, model_config.has_first_value_mix) == (ranks, False)


def test_saving_what_was_read_changes_no_bit(model_file: Path, tmp_path: Path) -> None:
    write_like(tmp_path / "copy.pth", model_file, {})
    one, other = torch.load(model_file), torch.load(tmp_path / "copy.pth")
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name])


def test_a_view_is_saved_without_the_storage_around_it(tmp_path: Path) -> None:
    big = torch.zeros(1000, 1000)
    write_weights(tmp_path / "view.pth", {"x": big[:2]})
    assert (tmp_path / "view.pth").stat().st_size < 20_000


def test_safetensors_and_pth_give_the_same_model(model_file: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "same.safetensors", read_weights(model_file))
    tokens = torch.tensor([[5, 6, 7]])
    one = rwkv_peft.load_model(model_file)(tokens)[0]
    assert torch.equal(one, rwkv_peft.load_model(tmp_path / "same.safetensors")(tokens)[0])


def test_files_older_than_the_zip_format_load(model_file: Path, tmp_path: Path) -> None:
    weights = torch.load(model_file)
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    again = read_weights(tmp_path / "old.pth")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_all_problems_of_a_file_are_in_one_error(model_file: Path, tmp_path: Path) -> None:
    weights = dict(torch.load(model_file))
    del weights["blocks.1.att.a0"]
    weights["blocks.0.att.extra"] = torch.zeros(3)
    weights["blocks.1.ffn.key.weight"] = torch.zeros(4, 4)
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as caught:
        rwkv_peft.load_model(tmp_path / "bad.pth")
    message = str(caught.value)
    assert "3 problems" in message
    assert "missing blocks.1.att.a0" in message
    assert "unexpected blocks.0.att.extra" in message
    assert "blocks.1.ffn.key.weight is (4, 4) instead of (512, 128)" in message
    assert "\n" not in message


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"emb.weight": RunsCode()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth is refused.*would run code"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    ("keep", "what"),
    [(0, "an empty file"), (10, "truncated"), (5000, "truncated"), (-100, "trunc")],
)
def test_a_truncated_file_is_named(keep: int, what: str, model_file: Path, tmp_path: Path) -> None:
    data = model_file.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"cut\.pth is {what}"):
        read_weights(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("lists.pth", [1, 2], "holds a list"),
        ("numbers.pth", {"emb.weight": 3}, "other things than tensors"),
        ("foreign.pth", {"a": torch.zeros(1)}, "not an RWKV model"),
        (
            "v4.pth",
            {
                "emb.weight": torch.zeros(9, 8),
                "head.weight": torch.zeros(9, 8),
                "blocks.0.att.time_decay": torch.zeros(8),
            },
            r"x040, and only x070, x060, x052, x051, x050 can be used",
        ),
    ],
)
def test_a_file_of_something_else_says_what_it_is(
    name: str, weights: object, message: str, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        rwkv_peft.load_model(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk_leaves_the_previous_file_and_no_rest(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    write_weights(path, {"x": torch.ones(10)})
    before = path.read_bytes()
    # a limit on the size of files fails a write just as a full disk does
    code = (
        "import resource, signal, sys, torch\n"
        "from rwkv_peft.checkpoint.pth import write_weights\n"
        "from rwkv_peft.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    write_weights(sys.argv[1], {f'x{i}': torch.ones(10_000) for i in range(9)})\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout
    assert "the previous file is untouched" in done.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
