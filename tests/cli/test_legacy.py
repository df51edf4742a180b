import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from rwkv_peft.checkpoint.older import LegacyAdapterHints
from rwkv_peft.cli.legacy.methods import NAMING, OPTIONS
from rwkv_peft.cli.legacy.train import DEAD, FIXED, MODEL_FLAGS, translate_train
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import UNSAVED, TrainConfig
from rwkv_peft.errors import ConfigError

Cli = Callable[..., SimpleNamespace]

# an old line, and the line of today that asks for the same
TRANSLATIONS = {
    "--optim adam": "--optimizer adamw",
    "--optimizer none": "--optimizer adamw",
    "--optimizer adamw --head_size_divisor 8": "--optimizer adamw",
    "--strategy ddp_find_unused_parameters_true": "--strategy ddp",
    "--strategy deepspeed_stage_1 --devices 1": "--strategy deepspeed_stage_1 --devices 1",
    "--warmup_steps -1": "--warmup_steps 0",
    "--epoch_save 0": "--epoch_save 99999999",
    "--train_type states": "--train_type state",
    "--train_type infctx --chunk_ctx 512 --ctx_len 2048": (
        "--train_type infctx --chunk_ctx 512 --ctx_len 2048"
    ),
    "--train_type none --chunk_ctx 512": "--train_type none --chunk_ctx 512",
    "--fla": "--op fla",
    "--fla --op torch": "--op torch",
    "--op cuda": "--op cuda",
    "--quant none": "",
    "--quant 4bit": "--quant nf4",
    "--quant 8bit": "--quant int8",
    "--quant int8": "--quant int8",
    "--quant nf4": "--quant nf4",
    "--quant fp4": "--quant fp4",
    "--wandb ''": "",
    "--my_exit 99999999 --my_exit_tokens 0": "",
    "--my_exit 3 --epoch_begin 1 --epoch_count 9": "--epoch_begin 1 --epoch_count 2",
    "--my_exit 3 --epoch_count 2": "--epoch_count 2",
    "--my_exit_tokens 1000 --ctx_len 10 --micro_bsz 2 --epoch_steps 20": (
        "--ctx_len 10 --micro_bsz 2 --epoch_steps 20 --epoch_count 3"
    ),
    "--lora --lora_r 8 --lora_alpha 16 --lora_dropout 0.1": (
        """--peft lora --peft_config '{"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}'"""
    ),
    "--lora --lora_load out/rwkv-0.pth --lora_r 8": (
        """--peft lora --load_adapter out/rwkv-0.pth"""
    ),
    # an old file holds tensors alone, a folder its options too
    "--lora --lora_load out/rwkv-0.pth --lora_r 8 --lora_alpha 16 --lora_dropout 0.1": (
        "--peft lora --load_adapter out/rwkv-0.pth "
        """--peft_config '{"lora_alpha": 16, "lora_dropout": 0.1}'"""
    ),
    "--load_adapter out/rwkv-0.pth --lora_alpha 16": (
        """--load_adapter out/rwkv-0.pth --peft_config '{"lora_alpha": 16}'"""
    ),
    "--lora --lora_load out/adapter --lora_r 8 --lora_alpha 16": (
        "--peft lora --load_adapter out/adapter"
    ),
    """--peft pissa --pissa_config '{"pissa_load":"o/0.pth","pissa_init":"o/init.pth"}'""": (
        """--peft pissa --load_adapter o/0.pth --peft_config '{"pissa_init": "o/init.pth"}'"""
    ),
    "--lora --PISSA --lora_alpha 16 --pissa_load 0.pth --pissa_init i.pth": (
        """--peft pissa --load_adapter 0.pth --peft_config '{"pissa_init": "i.pth"}'"""
    ),
    "--lora --lora_parts=att": (
        "--peft lora --peft_config "
        r"""'{"target_modules": ".*\\.att\\.(receptance|key|value|gate|output)"}'"""
    ),
    "--lora --lora_parts att,ffn": "--peft lora",
    "--lora --PISSA --lora_r 8 --lora_alpha 16 --svd_niter 4": (
        "--peft pissa --peft_config "
        """'{"r": 8, "svd_niter": 4}'"""
    ),
    "--state_tune": "--peft state",
    "--optim lion": "--optimizer lion",
    "--optim adamw_torch --precision bfloat16 --lr_schedule cosine": (
        "--optimizer adamw --precision bf16 --lr_schedule cos"
    ),
    "--LISA --lisa_r 2 --lisa_k 100": "--peft lisa",
    """--peft lora --lora_config '{"lora_load":"", "lora_r":8, "lora_alpha":32}'""": (
        """--peft lora --peft_config '{"r": 8, "lora_alpha": 32}'"""
    ),
    """--lora_config '{"lora_r":8}' --peft_config '{"r":4}' --peft lora""": (
        """--peft lora --peft_config '{"r": 4}'"""
    ),
    """--peft pissa --pissa_config '{"pissa_load":"","pissa_r":32,"svd_niter":4}'""": (
        "--peft pissa --peft_config "
        """'{"r": 32, "svd_niter": 4}'"""
    ),
    """--peft bone --bone_config '{"bone_mode":"bone","bone_load":"","bone_r":64}'""": (
        """--peft miss --peft_config '{"r": 64}'"""
    ),
    """--peft DiSHA --disha_config '{"mode":"bat","load":"","r":64}'""": (
        """--peft miss --peft_config '{"r": 64, "init_weights": "bat"}'"""
    ),
    """--peft miss --miss_config '{"mode":"mode","load":"","r":64}'""": (
        """--peft miss --peft_config '{"r": 64}'"""
    ),
    """--disha_config '{"load":"a.pth","r":64}'""": "--peft miss --load_adapter a.pth",
    # old names inside peft_config
    """--peft Bone --peft_config '{"bone_mode":"bat","bone_load":"","bone_r":64}'""": (
        """--peft miss --peft_config '{"r": 64, "init_weights": "bat"}'"""
    ),
    """--peft disha --peft_config '{"mode":"mode","r":8}'""": (
        """--peft miss --peft_config '{"r": 8}'"""
    ),
    """--peft bone --peft_config '{"bone_load":"a.pth","bone_r":64}'""": (
        "--peft miss --load_adapter a.pth"
    ),
    """--peft lora --peft_config '{"load":"out/adapter","r":8,"lora_alpha":16}'""": (
        "--peft lora --load_adapter out/adapter"
    ),
    """--peft lora --peft_config '{"lora_load":"a.pth","lora_r":8,"lora_alpha":16}'""": (
        """--peft lora --load_adapter a.pth --peft_config '{"lora_alpha": 16}'"""
    ),
    """--peft pissa --peft_config '{"pissa_load":"a.pth","pissa_init":"i.pth","lora_alpha":9}'""": (
        """--peft pissa --load_adapter a.pth --peft_config '{"pissa_init": "i.pth"}'"""
    ),
    """--peft pissa --peft_config '{"pissa_load":"","pissa_init":"","pissa_r":8}'""": (
        """--peft pissa --peft_config '{"r": 8}'"""
    ),
    """--peft lora --train_parts ln --peft_config '{"r":8,"train_parts":["emb","ln"]}'""": (
        """--peft lora --train_parts '["ln", "emb"]' --peft_config '{"r": 8}'"""
    ),
    "--peft_config {lora_r: 8}": """--peft_config '{"r": 8}'""",
    "--peft full": "--peft none",
    # what a shell leaves of JSON without quotes around it
    """--peft lora --peft_config {\\"r\\": 8, \\"lora_alpha\\": 16}""": (
        """--peft lora --peft_config '{"r": 8, "lora_alpha": 16}'"""
    ),
    "--train_parts []": "",
    "--sft_field q r": """--sft_field '["q", "r"]'""",
    "--sft_field query response --sft_split 'train[:1000]'": (
        """--sft_field '["query", "response"]' --sft_split 'train[:1000]'"""
    ),
    "--ctx-len=8": "--ctx_len 8",
}
# lines of the program's own scripts, with two steps of a small run for their sizes
SCRIPTS = {
    "run_lora.sh": (
        "--vocab_size 320 --n_layer 2 --n_embd 128 --data_type jsonl --dataload pad "
        "--loss_mask pad --ctx_len 32 --micro_bsz 8 --epoch_steps 2 --epoch_count 1 "
        "--epoch_begin 0 --epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 "
        "--beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator cpu --devices 1 --precision bf16 "
        "--strategy deepspeed_stage_1 --grad_cp 1 --my_testing x070 "
        """--peft lora --lora_config {"lora_load":"", "lora_r":4, "lora_alpha":32}"""
    ),
    "2024": (
        "--random_seed 1 --vocab_size 320 --ctx_len 32 --epoch_steps 2 --epoch_count 1 "
        "--epoch_save 1 --micro_bsz 1 --n_layer 2 --n_embd 128 --pre_ffn 0 --head_qk 0 "
        "--lr_init 5e-5 --lr_final 5e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.999 "
        "--adam_eps 1e-8 --accelerator cpu --devices 1 --precision bf16 "
        "--strategy deepspeed_stage_2 --grad_cp 0 --accumulate_grad_batches 2 --my_testing x070 "
        "--lora --lora_r 4 --lora_alpha 16 --lora_dropout 0.01 --lora_load '' --lora_parts=att,ffn"
    ),
}


@pytest.mark.parametrize("line", TRANSLATIONS)
def test_an_old_line_is_translated(line: str) -> None:
    found, expected = translate_train(shlex.split(line)), shlex.split(TRANSLATIONS[line])
    assert sorted(found.arguments) == sorted(expected)


def test_todays_flags_and_positions_pass_through_in_their_order() -> None:
    line = ["m.pth", "d.jsonl", "--config", "a.yaml", "--ctx_len", "8", "--config", "b.yaml", "-h"]
    assert translate_train(line) == (line, [], {})


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_flag_is_left_out_with_one_note(name: str) -> None:
    line = ["--ctx_len", "8", f"--{name}", "1", "--micro_bsz", "2"]
    arguments, notes, _ = translate_train(line)
    assert arguments == ["--ctx_len", "8", "--micro_bsz", "2"]
    assert len(notes) == 1 and notes[0].startswith(f"--{name} has no effect: ")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_without_its_method_names_it_or_is_noted(name: str) -> None:
    found = translate_train([f"--{name}", "1"])
    if name in NAMING:
        option = {"r": 1} if name.endswith("_r") else {name: 1}
        assert found.arguments == ["--peft", NAMING[name], "--peft_config", json.dumps(option)]
        assert not found.notes
        note = f"--{name} has no effect: no method is named"
        assert translate_train([f"--{name}", "1", "--peft", "none"]).notes == [note]
    else:
        assert found == ([], [f"--{name} has no effect: no method is named"], {})


def test_the_config_of_another_method_is_noted() -> None:
    line = ["--peft", "lora", "--pissa_config", "{}", "--lora_config", '{"lora_r": 3}']
    arguments, notes, _ = translate_train(line)
    assert arguments == ["--peft", "lora", "--peft_config", '{"r": 3}']
    assert notes == ["--pissa_config has no effect: the method is lora"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--lora_config", "{lora_r:8}"], r"--lora_config: got \{lora_r:8\}, allowed is JSON"),
        (["--lora_config"], "--lora_config: got nothing, allowed is JSON"),
        (
            ["--lora_load", "a.pth", "--lora_alpha", "x", "--lora"],
            "lora_alpha: got x, allowed is a number",
        ),
        (["--lora", "--lora_r", "x"], "r: got x, allowed is a number"),
        (["--head_size_divisor", "4"], "--head_size_divisor: got 4, allowed is 8"),
        (["--head_size_divisor", "16"], "--head_size_divisor: got 16, allowed is 8"),
        (["--lora_config", "[1]"], r"got \[1\], allowed is JSON in quotes"),
        (["--my_exit_tokens", "99"], "--my_exit_tokens needs --ctx_len, --micro_bsz and"),
        (["--my_exit", "soon"], "--my_exit: got soon, allowed is a whole number"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(line: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        translate_train(line)
    assert "\n" not in str(caught.value)


def test_wandb_of_an_old_line_is_a_note_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments, (note,), _ = translate_train(["--wandb", "mine", "--ctx_len", "8"])
    assert arguments == ["--ctx_len", "8"]
    assert note.startswith("--wandb mine has no effect: wandb is not installed")
    asked = ["--wandb", "mine", "--report_to", "wandb"]
    assert "--wandb" in translate_train(asked).arguments


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_old_runs(
    name: str, cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    # words as a script's unquoted $lora_config leaves them
    words = [word.strip("'") for word in SCRIPTS[name].split(" ")]
    files = ["--load_model", model_file, "--data_file", data_file, "--proj_dir", tmp_path / "out"]
    done = cli("train", *files, *words)
    assert done.code == 0, done.err
    adapter = json.loads((tmp_path / "out" / "rwkv-0-adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4
    assert (tmp_path / "out" / "loss_data.jsonl").read_text().count("\n") == 2 - (name == "2024")
    assert ("note: --pre_ffn has no effect" in done.err) == (name == "2024")


def test_every_flag_of_today_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    for name in parse(TrainConfig, [], command="train").__dataclass_fields__:
        assert translate_train([f"--{name}", "1"]).arguments[0] == f"--{name}", name


def test_flags_of_the_model_are_taken_out_and_the_last_word_counts(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("n_layer: 2\nn_embd: 128\nhead_size: 64\ndim_ffn: 0\n")
    line = ["--config", str(tmp_path / "c.yaml"), "--n_layer", "3", "--n_embd", "0"]
    found = translate_train([*line, "--my_testing", "x070", "--vocab_size", "0"])
    assert found.arguments == ["--config", "{}"] and not found.notes
    assert found.model_flags == {"n_layer": "3", "head_size_a": "64", "my_testing": "x070"}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("n_layer", "3"),
        ("n_embd", "256"),
        ("vocab_size", "65536"),
        ("dim_att", "64"),
        ("dim_ffn", "9"),
        ("head_size_a", "32"),
        ("my_testing", "x060"),
    ],
)
@pytest.mark.parametrize("is_in_file", [False, True])
def test_a_flag_that_contradicts_the_model_names_both_values(
    flag: str, value: str, is_in_file: bool, cli: Cli, model_file: Path, data_file: Path
) -> None:
    line = [f"--{flag}", value]
    if is_in_file:
        (data_file.parent / "run.yaml").write_text(f"{flag}: {value}\n")
        line = ["--config", str(data_file.parent / "run.yaml")]
    done = cli("train", model_file, data_file, *line)
    assert done.code == 2
    assert re.fullmatch(rf"error: --{flag} {value} contradicts .*it is \w+: .*\n", done.err)


@pytest.mark.parametrize(
    ("said", "there", "is_taken"),
    [("1", "1", True), ("0", "0", True), ("0", None, True), ("0", "1", False), ("1", None, False)],
)
def test_the_rank_that_a_launcher_adds_to_a_line_is_that_of_the_environment(
    said: str, there: str | None, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if there is not None:
        monkeypatch.setenv("LOCAL_RANK", there)
    for flag in ("--local_rank", "--local-rank"):
        line = ["base.pth", "data.jsonl", "--micro_bsz", "2", f"{flag}={said}"]
        if is_taken:
            found = translate_train(line)
            assert found.arguments == line[:-1]
            assert not found.notes and not found.model_flags
        else:
            wanted = f"^--local_rank {said} contradicts LOCAL_RANK={there or 0}: leave the flag out"
            with pytest.raises(ConfigError, match=wanted):
                translate_train(line)


def test_a_size_that_is_not_a_number_is_refused(
    cli: Cli, model_file: Path, data_file: Path
) -> None:
    done = cli("train", model_file, data_file, "--n_layer", "two")
    assert done.err == "error: --n_layer: got two, allowed is a whole number\n"


def test_the_config_of_an_older_run_repeats_it(
    cli: Cli, model_file: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """older_run.yaml was written by version 0.1.0, with every field that TrainConfig had then."""
    path = Path(__file__).with_name("older_run.yaml")
    older = yaml.safe_load(path.read_text(encoding="utf-8"))
    gone = {*MODEL_FLAGS, *FIXED}
    assert gone == older.keys() - {f.name for f in fields(TrainConfig)}
    monkeypatch.chdir(model_file.parent)
    done = cli("train", "--config", path)
    assert done.code == 0, done.err
    saved = yaml.safe_load(Path("out/config.yaml").read_text(encoding="utf-8"))
    # fields that came since have their defaults, or what is chosen on a CPU
    new = {f.name: getattr(TrainConfig(), f.name) for f in fields(TrainConfig)}
    new |= {"compile": 0, "cuda_graph": 0, "emb_cpu": 0, "optimizer_cpu": 0}
    assert saved == new | {name: value for name, value in older.items() if name not in gone}
    again = cli("train", "--config", path, "--n_layer", 3)
    assert again.code == 2 and "--n_layer 3 contradicts base.pth, where it is 2" in again.err


# keys of a YAML file, and the fields of TrainConfig that they give
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "an old method with an adapter": (
        "peft: bone\npeft_config: {bone_r: 8, bone_load: x.pth}\n",
        {"peft": "miss", "load_adapter": "x.pth", "peft_config": {}},
    ),
    "old options": (
        "peft: DiSHA\npeft_config:\n  mode: bat\n  r: 8\n",
        {"peft": "miss", "peft_config": {"r": 8, "init_weights": "bat"}},
    ),
    "a config of a method": (
        "lora_config: {lora_r: 4, lora_dropout: 1e-2, lora_load: ''}\n",
        {"peft": "lora", "peft_config": {"r": 4, "lora_dropout": 0.01}},
    ),
    "switches": ("lora: true\nPISSA: false\nfla: false\n", {"peft": "lora", "op": "auto"}),
    "values": (
        "optim: adam\ntrain_type: states\nwarmup_steps: -1\nepoch_save: 0\nmy_exit: 2\n",
        {"train_type": "state", "warmup_steps": 0, "epoch_save": 99999999, "epoch_count": 2},
    ),
    "what is of today": (
        "lr_init: 1e-5\nctx_len:\nproj_dir: 2026-01-02\nforce: true\ntrain_parts: [ln, 字]\n"
        "sft_field: ['a b', 'c,d']\nmask_id: {mask1: '5'}\npeft_config: {lora_dropout: 1e-2}\n",
        {
            "lr_init": 1e-5,
            "ctx_len": None,
            "proj_dir": "2026-01-02",
            "force": True,
            "train_parts": ["ln", "字"],
            "sft_field": ["a b", "c,d"],
            "mask_id": {"mask1": "5"},
            "peft_config": {"lora_dropout": 0.01},
        },
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_old_keys_of_a_yaml_file_are_translated(case: str, tmp_path: Path) -> None:
    text, expected = FILES[case]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    arguments, _, _ = translate_train(["--config", str(tmp_path / "run.yaml")])
    config = parse(TrainConfig, arguments, command="train")
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_dead_key_of_a_yaml_file_is_noted_and_an_old_value_translated(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("pre_ffn: 0\n")
    _, notes, _ = translate_train(["--config", str(tmp_path / "run.yaml")])
    assert notes == ["--pre_ffn has no effect: RWKV-5, 6 and 7 have no such part"]
    (tmp_path / "run.yaml").write_text("quant: 4bit\n")
    arguments, _, _ = translate_train(["--config", str(tmp_path / "run.yaml")])
    assert parse(TrainConfig, arguments, command="train").quant == "nf4"


def test_what_an_old_adapter_file_lacks_has_one_list_of_names() -> None:
    assert LegacyAdapterHints._fields == UNSAVED
