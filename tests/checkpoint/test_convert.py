import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft import convert
from rwkv_peft.checkpoint.adapter import attach_saved, read_adapter, write_adapter
from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.attach import attach
from tests.checkpoint.old_files import ALPHA, VERSIONS, Weights, old_pissa, old_run, scale

Cli = Callable[..., SimpleNamespace]
MakeModel = Callable[..., Path]
TOKENS = torch.arange(1, 25).view(1, 24)


def adapted(folder: Path, base: Path, method: str, options: dict[str, Any]) -> Tensor:
    """Writes an adapter moved at random, as if trained, and gives its logits."""
    model = rwkv_peft.load_model(base)
    trained = attach(model, method, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.values():
            p += torch.randn(p.shape, generator=generator) * 0.05
        logits = model(TOKENS)[0]
    write_adapter(folder, trained, trained, base=base)
    return logits


@torch.no_grad()
def logits_of(base: Path, **options: Any) -> Tensor:
    return rwkv_peft.load_model(base, **options)(TOKENS)[0]


@pytest.mark.parametrize(
    "form",
    ["lora with parts", "some modules", "bone that does not divide", "bat", "bat along outputs"],
)
def test_an_old_file_becomes_a_folder_of_its_base(
    form: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    base, folder = make_model_file(), tmp_path / "folder"
    old, _ = old_run(tmp_path, base, form)
    line = convert(old, folder, base, **scale(form))
    assert line.endswith(f" {len(torch.load(old))} tensors")
    direct = logits_of(base, adapter=old, **scale(form))
    assert torch.equal(logits_of(base, adapter=folder), direct)
    assert (direct - logits_of(base)).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    other = make_model_file("other.pth", seed=1)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        rwkv_peft.load_model(other, adapter=folder)


def test_the_folder_of_a_plain_old_lora_opens_in_peft_itself(
    make_model_file: MakeModel, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = make_model_file(dtype=torch.float32)
    old, _ = old_run(tmp_path, base, "lora")
    convert(old, tmp_path / "folder", base, lora_alpha=ALPHA)
    model: Any = PeftModel.from_pretrained(rwkv_peft.load_model(base), str(tmp_path / "folder"))
    found = model.base_model.model(TOKENS)[0]
    expected = logits_of(base, adapter=old, lora_alpha=ALPHA)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
@pytest.mark.parametrize(
    "options",
    [{"r": 4}, {"r": 4, "lora_alpha": 2, "rank_pattern": {"att.key": 2}, "use_rslora": True}],
)
def test_pissa_goes_to_residual_and_adapter_and_back(
    options: dict[str, Any],
    make_model_file: MakeModel,
    official_logits: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    base = make_model_file(dtype=torch.float32)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    logits = adapted(adapter, base, "pissa", options)
    convert(adapter, out, base, to="residual")
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "init_pissa.pth", "residual.pth"]
    own = read_adapter(out / "adapter").tensors
    assert own["base_model.model.blocks.0.att.value.lora_A.weight"].shape == (4, 128)
    found = logits_of(out / "residual.pth", adapter=out / "adapter")
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    # on paper: the residual and A and B of the folder give a model for the official runtime
    weights = read_weights(out / "residual.pth")
    for name, a in own.items():
        if ".lora_A." in name:
            key = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[key] = weights[key] + own[name.replace("lora_A", "lora_B")] @ a
    write_weights(tmp_path / "hand.pth", weights)
    official = official_logits(tmp_path / "hand.pth", TOKENS[0].tolist())
    torch.testing.assert_close(official, logits[0], rtol=0, atol=1e-4)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        rwkv_peft.load_model(base, adapter=out / "adapter")
    convert(out / "adapter", tmp_path / "back", base, pissa_init=out / "init_pissa.pth")
    torch.testing.assert_close(
        logits_of(base, adapter=tmp_path / "back"), logits, rtol=0, atol=1e-5
    )
    if "use_rslora" not in options:
        before, after = read_adapter(adapter), read_adapter(tmp_path / "back")
        assert all(torch.equal(x, after.tensors[n]) for n, x in before.tensors.items())
        assert after.note["init"] and after.config.r == before.config.r == 8


def test_an_old_pissa_pair_comes_back_as_it_was(make_model_file: MakeModel, tmp_path: Path) -> None:
    base = make_model_file(dtype=torch.float32)
    old, init, _ = old_pissa(tmp_path, base)
    convert(old, tmp_path / "out", base, to="residual", pissa_init=init)
    start, again = torch.load(init), torch.load(tmp_path / "out" / "init_pissa.pth")
    assert {f"model.{n}" for n in again} == set(start)
    assert all(torch.equal(x, start[f"model.{n}"]) for n, x in again.items())
    line = convert(
        old,
        tmp_path / "half",
        make_model_file("half.pth"),
        to="residual",
        pissa_init=init,
    )
    assert "rounded to bfloat16, --dtype fp32 rounds nothing" in line
    weights = read_weights(tmp_path / "half" / "residual.pth")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}


LORA_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4, "lora_alpha": 12}),
    "lora with patterns": (
        "lora",
        {
            "r": 4,
            "use_rslora": True,
            "rank_pattern": {"att.key": 2},
            "alpha_pattern": {"ffn.key": 3},
        },
    ),
    "pissa": ("pissa", {"r": 4}),
    "miss": ("miss", {"r": 12}),
    "mini": ("miss", {"r": 8, "init_weights": "mini", "mini_r": 32}),
}


@pytest.mark.parametrize("name", LORA_FORMS)
def test_the_file_of_lora_factors_gives_the_adapters_logits_on_paper(
    name: str, make_model_file: MakeModel, official_logits: Callable[..., Tensor], tmp_path: Path
) -> None:
    base, output = make_model_file(dtype=torch.float32), tmp_path / "lora.pth"
    logits = adapted(tmp_path / "adapter", base, *LORA_FORMS[name])
    line = convert(tmp_path / "adapter", output, base, to="pth")
    alpha = float(line.rpartition(" ")[2])
    assert name != "lora" or alpha == 12
    file: Weights = torch.load(output, weights_only=True)
    weights = read_weights(base)
    for key, a in file.items():
        if key.endswith(".lora_A"):
            own, b = key.replace("lora_A", "weight"), file[key.replace("lora_A", "lora_B")]
            weights[own] = weights[own] + alpha / len(a) * b @ a
    write_weights(tmp_path / "hand.pth", weights)
    official = official_logits(tmp_path / "hand.pth", TOKENS[0].tolist())
    torch.testing.assert_close(official, logits[0], rtol=0, atol=1e-4)


def test_parts_trained_beside_go_into_the_file_of_factors_and_back(
    make_model_file: MakeModel, tmp_path: Path
) -> None:
    base, again = make_model_file(**VERSIONS["x060"]), tmp_path / "again.pth"
    old, _ = old_run(tmp_path, base, "lora with parts")
    convert(old, tmp_path / "folder", base, lora_alpha=ALPHA)
    convert(tmp_path / "folder", again, base, to="pth")
    before = {n.removeprefix("model."): x for n, x in read_weights(old).items()}
    after = read_weights(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[n]) for n, x in before.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_among_other_tensors_and_prefixes_becomes_a_state_file(
    version: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    base, output = make_model_file(**VERSIONS[version]), tmp_path / "state.pth"
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}
    whole = read_weights(base) | states
    torch.save({f"model.{n}": x.bfloat16() for n, x in whole.items()}, tmp_path / "old.pth")
    assert "a state of 2 tensors" in convert(tmp_path / "old.pth", output, base)
    found = torch.load(output, weights_only=True)
    assert list(found) == list(states)
    assert all(torch.equal(found[n], x.bfloat16().float()) for n, x in states.items())
    torch.save({n: x * 0 for n, x in states.items()}, tmp_path / "zero.pth")
    with pytest.raises(CheckpointError, match="changes nothing: all of its state is zero"):
        convert(tmp_path / "zero.pth", tmp_path / "o.pth", base)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dora": ("lora", {"r": 4, "use_dora": True}, {"to": "pth"}, "is no plain LoRA or MiSS"),
    "vera": ("vera", {}, {"to": "pth"}, "is no plain LoRA or MiSS"),
    "bat": ("miss", {"r": 8, "init_weights": "bat"}, {"to": "pth"}, "is no plain LoRA or MiSS"),
    "no pissa": ("lora", {"r": 4}, {"to": "residual"}, "only an adapter of PiSSA has a residual"),
    "alpha": ("lora", {"r": 4}, {"lora_alpha": 8}, "brings its own lora_alpha: leave it out"),
    "init of another": (
        "miss",
        {"r": 4},
        {"pissa_init": "i.pth"},
        "no LoRA with a scale of 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_form_is_refused_and_nothing_written(
    name: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    base = make_model_file()
    method, options, given, message = REFUSED[name]
    adapted(tmp_path / "adapter", base, method, options)
    before = sorted(tmp_path.iterdir())
    output = tmp_path / ("o.pth" if given.get("to") == "pth" else "o")
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        convert(tmp_path / "adapter", output, base, **given)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def run(base: Path, data: Path, folder: Path, **changes: Any) -> Path:
    """A short run of training further, and its adapter."""
    settings: dict[str, Any] = {"epoch_count": 1, "lr_init": 1e-3, "merge": 0, **changes}
    config = TrainConfig(
        load_model=str(base),
        data_file=str(data),
        proj_dir=str(folder),
        micro_bsz=4,
        ctx_len=32,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
        **settings,
    )
    adapter = rwkv_peft.train(config).adapter
    assert adapter is not None
    return adapter


# the method and the options of an old line, without those that name files
OLD_OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora with parts": ("lora", "lora_load", {"lora_r": 4, "lora_alpha": ALPHA}),
    "bat": ("bone", "bone_load", {"bone_r": 16, "bone_mode": "bat"}),
    "pissa": ("pissa", "pissa_load", {"pissa_r": 4, "svd_niter": 4}),
}


@pytest.mark.parametrize("form", OLD_OPTIONS)
def test_training_an_old_file_further_is_training_its_folder_further(
    form: str, make_model_file: MakeModel, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    base = make_model_file()
    given: dict[str, Any] = scale(form)
    if form == "pissa":
        old, init, hand = old_pissa(tmp_path, base)
        given = {"pissa_init": str(init)}
    else:
        old, hand = old_run(tmp_path, base, form)
    convert(old, tmp_path / "folder", base, **given)
    method, key, options = OLD_OPTIONS[form]
    options = {key: str(old), **options, **given}
    results = [
        run(base, data_file, tmp_path / "folders", load_adapter=str(tmp_path / "folder")),
        run(base, data_file, tmp_path / "file", load_adapter=str(old), peft_config=given),
    ]
    line = ["train", "--config", tmp_path / "folders" / "config.yaml", "--load_adapter", ""]
    for flag in (f"{method}_config", "peft_config"):
        more = ["--proj_dir", tmp_path / flag, "--peft", method, f"--{flag}", json.dumps(options)]
        done = cli(*line, *more)
        assert done.code == 0, done.err
        results.append(tmp_path / flag / "rwkv-0-adapter")
    begin = read_adapter(tmp_path / "folder").tensors
    one, *others = (read_adapter(r).tensors for r in results)
    assert not any(torch.equal(x, begin[n]) for n, x in one.items() if "lora_" not in n)
    assert one.keys() == begin.keys()
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(x, other[n]) for n, x in one.items())
    # it begins where a new adapter on the base merged by hand does
    run(hand, data_file, tmp_path / "hand", peft="lora")
    loss = first_loss(tmp_path / "folders")
    assert loss == pytest.approx(first_loss(tmp_path / "hand"), rel=1e-5)


def first_loss(folder: Path) -> float:
    line = (folder / "loss_data.jsonl").read_text().splitlines()[0]
    return float(json.loads(line)["loss"])


def test_the_method_is_that_of_the_file(
    make_model_file: MakeModel, data_file: Path, tmp_path: Path
) -> None:
    base = make_model_file()
    old, _ = old_run(tmp_path, base, "disha")
    state = {f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)}
    torch.save(state, tmp_path / "state.pth")
    for name, source in (("miss", old), ("state", tmp_path / "state.pth")):
        out = tmp_path / name
        config = {"load_model": str(base), "data_file": str(data_file), "accelerator": "cpu"}
        config |= {"load_adapter": str(source), "proj_dir": str(out)}
        rwkv_peft.train(TrainConfig(**config, epoch_count=1, ctx_len=32, epoch_steps=1))
        log = (out / "train_log.txt").read_text()
        assert f"chosen: peft = {name} (the method of load_adapter)" in log
        with pytest.raises(ConfigError, match=f"--peft oft: .* holds {name}; leave --peft out"):
            other = {**config, "proj_dir": str(tmp_path / "other")}
            rwkv_peft.train(TrainConfig(**other, peft="oft"))
    assert list(read_weights(tmp_path / "state" / "rwkv-0.pth")) == list(state)


def test_a_folder_that_peft_wrote_for_an_older_run_is_read(
    make_model_file: MakeModel, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel

    base = make_model_file(dtype=torch.float32)
    names = ["receptance", "key", "value", "output"]
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=names, init_lora_weights=False)
    model: Any = rwkv_peft.load_model(base)
    model.config = {"model_type": "rwkv", "tie_word_embeddings": False}
    PeftModel(model, config).save_pretrained(str(tmp_path / "run-adapter"))
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(base, adapter=tmp_path / "run-adapter"), model(TOKENS)[0], rtol=0, atol=1e-5
        )


def test_the_command_converts_and_generates_from_old_files(
    cli: Cli, make_model_file: MakeModel, tmp_path: Path
) -> None:
    base, output = make_model_file(), tmp_path / "new"
    old, _ = old_run(tmp_path, base, "lora")
    line = ["convert", old, "--base_model", base, "--output", output]
    asked = cli(*line)
    assert asked.code == 2 and "give --lora_alpha" in asked.err and not output.exists()
    assert asked.err.count("\n") == 1
    done = cli(*line, "--lora_alpha", ALPHA)
    assert done.out == f"wrote {output}: lora of rank 4, lora_alpha 24, 24 tensors\n"
    again = cli(*line, "--lora_alpha", ALPHA)
    assert again.code == 2 and "exists: choose another name" in again.err
    strange = cli("convert", base, *line[2:-1], tmp_path / "other")
    assert strange.code == 2 and "holds no learned state and no adapter" in strange.err
    wrong = cli(*line[:-1], tmp_path / "new.pth", "--lora_alpha", ALPHA)
    assert wrong.code == 2 and "a folder's name is needed here" in wrong.err
    assert cli("inspect", old).out.splitlines()[1].split() == ["method", "lora"]
    facts = json.loads(cli("inspect", output, "--json").out)
    assert (facts["method"], facts["r"], facts["lora_alpha"]) == ("lora", 4, 24)
    assert "att.receptance" in facts["target_modules"] and len(facts["base"]) == 32
    torch.save({"blocks.0.att.time_state": torch.ones(2, 64, 64)}, tmp_path / "state.pth")
    assert json.loads(cli("inspect", tmp_path / "state.pth", "--json").out)["method"] == "state"
    prompt = ["generate", "--load_model", base, "--prompt", "row", "--max_tokens", 8]
    prompt += ["--temperature", 0, "--accelerator", "cpu"]
    texts = [
        cli(*prompt, *more).out
        for more in ([], ["--adapter", old, "--lora_alpha", ALPHA], ["--adapter", output])
    ]
    assert texts[1] == texts[2] != texts[0]


# all that `--to pth` writes: the scale of a module depends on each of these
WRITTEN: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("lora", {"r": 4, "lora_alpha": 9}, []),
    "ranks": ("lora", {"r": 4, "rank_pattern": {"att.key": 2, "ffn.value": 7}}, []),
    "ranks and alphas": (
        "lora",
        {"r": 4, "rank_pattern": {"att.key": 2}, "alpha_pattern": {"att.key": 7, "value": 0.5}},
        [],
    ),
    "rslora": ("lora", {"r": 4, "use_rslora": True, "rank_pattern": {"att.key": 2}}, []),
    "pissa": ("pissa", {"r": 4, "rank_pattern": {"att.key": 2}}, []),
    "miss": ("miss", {"r": 8}, []),
    "mini": ("miss", {"r": 8, "init_weights": "mini", "mini_r": 8}, []),
    "parts": ("lora", {"r": 4, "rank_pattern": {"1.att.key": 2}}, ["ln", "emb"]),
    "modules to save": ("lora", {"r": 4, "modules_to_save": ["head", "ln_x"]}, []),
    "one layer": ("lora", {"r": 4, "target_modules": r"blocks\.1\..*key"}, []),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_every_reader_reads_what_was_written_as_pth(
    case: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    method, options, parts = WRITTEN[case]
    base, folder, written = make_model_file(), tmp_path / "adapter", tmp_path / "adapter.pth"
    model = rwkv_peft.load_model(base)
    trained = attach(model, method, options, train_parts=parts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.values():
            p += torch.randn(p.shape, generator=generator) * 0.05
        wanted = model(TOKENS)[0]
    write_adapter(folder, trained, trained, base=base)
    line = convert(folder, written, base, to="pth")
    alpha = float(line.rsplit(" ", 1)[1])
    close: dict[str, Any] = {"rtol": 0, "atol": 2e-4}
    found = logits_of(base, adapter=written, lora_alpha=alpha)
    torch.testing.assert_close(found, wanted, **close)
    rwkv_peft.merge(base, written, tmp_path / "m.pth", lora_alpha=alpha, dtype="fp32", compare=0)
    torch.testing.assert_close(logits_of(tmp_path / "m.pth"), wanted, **close)
    more = rwkv_peft.load_model(base)
    attach_saved(more, written, hints=LegacyAdapterHints(lora_alpha=alpha))
    torch.testing.assert_close(more.eval()(TOKENS)[0].detach(), wanted, **close)
    convert(written, tmp_path / "back", base, lora_alpha=alpha)
    torch.testing.assert_close(logits_of(base, adapter=tmp_path / "back"), wanted, **close)
    convert(tmp_path / "back", tmp_path / "again.pth", base, to="pth")
    again, once = read_weights(tmp_path / "again.pth"), read_weights(written)
    assert again.keys() == once.keys()
    assert all(torch.equal(x, again[name]) for name, x in once.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adalora", {"total_step": 9}),
        ("lora", {"r": 4, "kasa_config": {}}),
        ("lora", {"use_dora": True}),
        ("loha", {}),
        ("miss", {"r": 8, "init_weights": "bat"}),
        ("lora", {"target_modules": r"blocks\.0\..*key"}),
    ],
)
def test_what_has_no_low_rank_form_is_not_written_as_one(
    method: str, options: dict[str, Any], make_model_file: MakeModel, tmp_path: Path
) -> None:
    base = make_model_file()
    adapted(tmp_path / "adapter", base, method, options)
    with pytest.raises(CheckpointError, match=r"is no plain LoRA or MiSS|adapts the first layers"):
        convert(tmp_path / "adapter", tmp_path / "a.pth", base, to="pth")
    assert not (tmp_path / "a.pth").exists()
