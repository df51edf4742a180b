import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_peft.cli.legacy import DEAD, OPTIONS, UNBUILT, translate
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError

Cli = Callable[..., SimpleNamespace]

# an old line, and the line of today that asks for the same
TRANSLATIONS = {
    "--head_size 64": "--head_size_a 64",
    "--optim adam": "--optimizer adamw",
    "--optimizer none": "--optimizer adamw",
    "--strategy ddp_find_unused_parameters_true": "--strategy ddp",
    "--strategy deepspeed_stage_1 --devices 1": "--strategy deepspeed_stage_1 --devices 1",
    "--warmup_steps -1": "--warmup_steps 0",
    "--epoch_save 0": "--epoch_save 99999999",
    "--train_type states": "--train_type state",
    "--fla": "--op fla",
    "--fla --op torch": "--op torch",
    "--op cuda": "--op cuda",
    "--quant none": "",
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
        """'{"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}'"""
    ),
    "--state_tune": "--peft state",
    "--LISA --lisa_r 2 --lisa_k 100": "--peft lisa",
    """--peft lora --lora_config '{"lora_load":"", "lora_r":8, "lora_alpha":32}'""": (
        """--peft lora --peft_config '{"r": 8, "lora_alpha": 32}'"""
    ),
    """--lora_config '{"lora_r":8}' --peft_config '{"r":4}' --peft lora""": (
        """--peft lora --peft_config '{"r": 4}'"""
    ),
    """--peft pissa --pissa_config '{"pissa_load":"","pissa_r":32,"svd_niter":4}'""": (
        "--peft pissa --peft_config "
        """'{"r": 32, "lora_alpha": 32, "init_lora_weights": "pissa_niter_4"}'"""
    ),
    """--peft bone --bone_config '{"bone_mode":"bone","bone_load":"","bone_r":64}'""": (
        """--peft bone --peft_config '{"r": 64}'"""
    ),
    """--peft DiSHA --disha_config '{"mode":"bat","load":"","r":64}'""": (
        """--peft disha --peft_config '{"r": 64, "init_weights": "bat"}'"""
    ),
    """--peft miss --miss_config '{"mode":"mode","load":"","r":64}'""": (
        """--peft miss --peft_config '{"r": 64}'"""
    ),
    """--disha_config '{"load":"a.pth","r":64}'""": "--peft miss --load_adapter a.pth",
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
    found, expected = translate(shlex.split(line)), shlex.split(TRANSLATIONS[line])
    assert sorted(found.arguments) == sorted(expected)


def test_todays_flags_and_positions_pass_through_in_their_order() -> None:
    line = ["m.pth", "d.jsonl", "--config", "a.yaml", "--ctx_len", "8", "--config", "b.yaml", "-h"]
    assert translate(line) == (line, [])


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_flag_is_left_out_with_one_note(name: str) -> None:
    arguments, notes = translate(["--ctx_len", "8", f"--{name}", "1", "--micro_bsz", "2"])
    assert arguments == ["--ctx_len", "8", "--micro_bsz", "2"]
    assert len(notes) == 1 and notes[0].startswith(f"--{name} has no effect: ")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_without_its_method_is_noted(name: str) -> None:
    assert translate([f"--{name}", "1"]) == ([], [f"--{name} has no effect: no method is named"])


def test_the_config_of_another_method_is_noted() -> None:
    line = ["--peft", "lora", "--pissa_config", "{}", "--lora_config", '{"lora_r": 3}']
    arguments, notes = translate(line)
    assert arguments == ["--peft", "lora", "--peft_config", '{"r": 3}']
    assert notes == ["--pissa_config has no effect: the method is lora"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--quant", "nf4"], "--quant nf4: quantised weights are not built yet: leave it out"),
        (["--lora_config", "{lora_r:8}"], r"--lora_config: got \{lora_r:8\}, allowed is JSON"),
        (["--lora_config"], "--lora_config: got nothing, allowed is JSON"),
        (
            ["--lora_load", "a.pth", "--lora_alpha", "x", "--lora"],
            "lora_alpha: got x, allowed is a number",
        ),
        (["--lora_config", "[1]"], r"got \[1\], allowed is JSON in quotes"),
        (["--my_exit_tokens", "99"], "--my_exit_tokens needs --ctx_len, --micro_bsz and"),
        (["--my_exit", "soon"], "--my_exit: got soon, allowed is a whole number"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(line: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        translate(line)
    assert "\n" not in str(caught.value)


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


def test_every_flag_of_today_passes_through() -> None:
    for name in parse(TrainConfig, [], command="train").__dataclass_fields__:
        if name not in UNBUILT:
            assert translate([f"--{name}", "7"]).arguments[0] == f"--{name}", name
