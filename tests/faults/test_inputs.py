"""A run keeps what it reads: it writes over none of it, and tells when others do."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import read_adapter
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.training.inputs import find_change, list_outputs, mark_file, require_kept_inputs
from rwkv_peft.training.step import full_step
from tests.faults.test_outputs import content_of

Cli = Callable[..., SimpleNamespace]


def config_of(model: Path, data: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "load_model": str(model),
        "data_file": str(data),
        "ctx_len": 16,
        "epoch_count": 2,
        "epoch_steps": 1,
        "random_seed": 1,
        "precision": "fp32",
        "accelerator": "cpu",
    }
    return TrainConfig(**{**given, **changes})


def move(path: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(to)


@pytest.mark.parametrize("peft", ["none", "lora", "state"])
@pytest.mark.parametrize("kind", ["same", "link", "hard", "dots", "linked folder"])
def test_a_base_in_its_own_folder_is_refused(
    peft: str, kind: str, model_file: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    base = given = move(model_file, tmp_path / "out" / "rwkv-1.pth")
    folder = base.parent
    if kind in ("link", "hard"):
        given = tmp_path / "other.pth"
        given.symlink_to(base) if kind == "link" else os.link(base, given)
    elif kind == "dots":
        given = tmp_path / "out" / ".." / "out" / base.name
    elif kind == "linked folder":
        folder = tmp_path / "linked"
        folder.symlink_to(base.parent)
    before = content_of(tmp_path)
    line = ["train", given, data_file, "--proj_dir", folder, "--peft", peft, "--epoch_count", 2]
    done = cli(*line)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "the run would write over rwkv-1.pth there" in done.err
    assert content_of(tmp_path) == before


def test_every_input_is_compared_with_every_output(
    model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("data", "loss_data.jsonl", {}),
        ("data", "train_log.txt", {"data_type": "utf-8"}),
        ("data", "rwkv-0.pth", {"data_type": "uint16"}),
        ("data", "checkpoints/rows.jsonl", {}),
        ("data", "rwkv-0-adapter/rows.jsonl", {}),
        ("model", "rwkv-0-adapter/base.pth", {}),
        ("model", "rwkv-0-name.pth", {"peft": "state"}),
        ("load_adapter", "rwkv-0.pth", {}),
        ("pissa_init", "rwkv-1.pth", {"peft": "pissa"}),
        ("template", "config.yaml", {}),
    ]
    for what, name, more in cases:
        given = {"model": model_file, "data": data_file}.get(what, tmp_path / "any.bin")
        given.touch()
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        placed = shutil.copy(given, out / name)
        model = placed if what == "model" else model_file
        data = placed if what == "data" else data_file
        if what in ("load_adapter", "template"):
            more = {**more, what: str(placed)}
        if what == "pissa_init":
            more = {**more, "peft_config": {what: str(placed)}}
        config = config_of(Path(model), Path(data), proj_dir=str(out), **more)
        with pytest.raises(ConfigError, match="the run would write over"):
            require_kept_inputs(config)
        shutil.rmtree(out)


def test_files_of_other_epochs_may_be_read(
    model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    base = move(model_file, tmp_path / "out" / "rwkv-3.pth")
    for begin, count, wanted in ((0, 3, 0), (0, 4, 1), (3, 1, 1), (4, None, 0), (0, None, 1)):
        config = config_of(
            base, data_file, proj_dir=str(base.parent), epoch_begin=begin, epoch_count=count
        )
        assert len(list(list_outputs(config, base.parent))) == wanted
    for name in ("rwkv-03.pth", "rwkv-x.pth", "base.pth", "rwkv-3.pth.bak"):
        (base.parent / name).touch()
    assert [path.name for path in list_outputs(config, base.parent)] == ["rwkv-3.pth"]


def test_a_config_of_the_user_is_not_replaced(
    model_file: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    own = tmp_path / "out" / "config.yaml"
    own.parent.mkdir()
    own.write_text(f"# mine\nload_model: {model_file}\ndata_file: {data_file}\n")
    for spelling in (own, own.parent / ".." / "out" / own.name):
        done = cli("train", "--config", spelling, "--proj_dir", own.parent)
        assert done.code == 2 and "rename it, or choose another --proj_dir" in done.err
    assert own.read_text().startswith("# mine") and os.listdir(own.parent) == [own.name]


CHANGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "deleted": (lambda base, other: base.unlink(), "cannot be read any more"),
    "replaced": (lambda base, other: other.replace(base), "was replaced by another file"),
    "changed": (lambda base, other: base.write_bytes(other.read_bytes()), "was changed"),
    "cut": (lambda base, other: base.write_bytes(base.read_bytes()[:-1]), "was changed"),
    "a folder": (lambda base, other: [base.unlink(), base.mkdir()], "was "),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_mark_tells_what_happened(how: str, tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    base.write_bytes(b"one")
    other.write_bytes(b"another")
    mark = mark_file(base)
    assert find_change(base, mark) == ""
    change, what = CHANGES[how]
    change(base, other)
    assert what in find_change(base, mark)


def train_while(config: TrainConfig, change: Callable[[], object]) -> Any:
    """Trains, and changes something before the second step."""
    calls: list[int] = []

    def step(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            change()
        return full_step(*args, **options)

    return rwkv_peft.train(config, step=step)


@pytest.mark.parametrize("how", ["deleted", "replaced", "changed"])
def test_an_adapter_is_saved_and_not_merged_into_another_base(
    how: str, make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    base, other = make_model_file("base.pth"), make_model_file("other.pth", seed=5)
    kept = shutil.copy(base, tmp_path / "kept.pth")
    out = tmp_path / "out"
    change, what = CHANGES[how]
    with pytest.raises(CheckpointError, match=rf"{what}.*rwkv-peft merge --base_model"):
        train_while(config_of(base, data_file, proj_dir=str(out)), lambda: change(base, other))
    assert (out / "rwkv-0.pth").exists() and not (out / "rwkv-1.pth").exists()
    assert what in (out / "train_log.txt").read_text(encoding="utf-8")
    # what the message says gives what the run would have given
    report = rwkv_peft.merge(kept, out / "rwkv-1-adapter", out / "rwkv-1.pth")
    assert report.changed
    again = rwkv_peft.train(config_of(Path(kept), data_file, proj_dir=str(tmp_path / "again")))
    one, two = read_weights(out / "rwkv-1.pth"), read_weights(again.weights)
    assert all(torch.equal(x, two[name]) for name, x in one.items())


@pytest.mark.parametrize("how", ["deleted", "replaced", "changed"])
@pytest.mark.parametrize("parts", [[], ["ffn"]])
def test_full_training_is_saved_whole_without_its_base(
    how: str,
    parts: list[str],
    make_model_file: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
) -> None:
    base, other = make_model_file("base.pth"), make_model_file("other.pth", seed=5)
    kept = Path(shutil.copy(base, tmp_path / "kept.pth"))
    change, what = CHANGES[how]
    given: dict[str, Any] = {"peft": "none", "train_parts": parts, "lr_init": 1e-3}
    config = config_of(base, data_file, proj_dir=str(tmp_path / "out"), **given)
    result = train_while(config, lambda: change(base, other))
    assert what in (tmp_path / "out" / "train_log.txt").read_text(encoding="utf-8")
    again = rwkv_peft.train(config_of(kept, data_file, proj_dir=str(tmp_path / "again"), **given))
    one, two = torch.load(result.weights), torch.load(again.weights)
    assert list(one) == list(two)
    for name, x in one.items():
        assert x.dtype == two[name].dtype and torch.equal(x, two[name]), name


def test_weights_that_are_not_finite_are_refused_by_name(
    make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    base = make_model_file(dtype=torch.float32)
    whole = dict(torch.load(base))
    names = ["emb.weight", "blocks.1.att.k_k", "blocks.0.ffn.key.weight", "ln_out.bias"]
    for count, value in ((1, float("nan")), (1, float("inf")), (1, -float("inf")), (4, 1e400)):
        weights = {n: x.clone() for n, x in whole.items()}
        for name in names[:count]:
            weights[name].flatten()[-1] = value
        torch.save(weights, base)
        run = ["train", base, data_file, "--proj_dir", tmp_path / "run"]
        for line in (run, ["generate", "--load_model", base, "--prompt", "a"]):
            done = cli(*line)
            assert done.code == 2 and "NaN or infinity in " in done.err, done.err
            assert names[0] in done.err and ("and 1 more" in done.err) == (count == 4)
            assert not (tmp_path / "run").exists()
    whole["head.weight"][0, 0] = 1e5
    torch.save(whole, base)
    done = cli("generate", "--load_model", base, "--prompt", "a", "--precision", "fp16")
    assert "too large for float16" in done.err
    assert cli("generate", "--load_model", base, "--prompt", "a", "--max_tokens", 1).code == 0


def test_adapters_and_states_that_are_not_finite_are_neither_saved_nor_read(
    model_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from rwkv_peft.checkpoint.folder import WEIGHTS, write_folder
    from rwkv_peft.checkpoint.state import read_state, write_state
    from tests.checkpoint.test_merge import make_adapter, make_state

    folder = make_adapter(model_file, tmp_path / "adapter", "lora", {"r": 4})
    adapter = read_adapter(folder)
    name = next(iter(adapter.tensors))
    adapter.tensors[name][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        write_folder(folder, adapter, model_file)
    read_adapter(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
        read_adapter(folder)

    state = make_state(model_file, tmp_path / "state.pth")
    model_config = rwkv_peft.load_model(model_file).model_config
    broken = {n: x.clone() for n, x in read_state(state, model_config).items()}
    name = next(iter(broken))
    broken[name][0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        write_state(state, broken)
    read_state(state, model_config)
    torch.save(broken, state)
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
        read_state(state, model_config)


@pytest.mark.parametrize("peft", ["none", "lora", "state"])
def test_a_run_saves_nothing_that_is_not_finite(
    peft: str, model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_peft.training import schedule

    rate = schedule.learning_rate
    steps = iter([1.0, float("inf")])
    monkeypatch.setattr(schedule, "learning_rate", lambda *a, **k: rate(*a, **k) * next(steps))
    config = config_of(model_file, data_file, proj_dir=str(tmp_path / "out"), peft=peft)
    with pytest.raises(CheckpointError, match=r"blocks\..* holds NaN or infinity|emb.weight holds"):
        rwkv_peft.train(config)
    assert sorted(p.name for p in (tmp_path / "out").glob("rwkv-*.pth")) == ["rwkv-0.pth"]
    assert not (tmp_path / "out" / "rwkv-1-adapter").exists()
