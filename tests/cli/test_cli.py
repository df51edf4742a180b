import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.cli.main import main

Cli = Callable[..., SimpleNamespace]
ROOT = Path(__file__).parents[2]


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was-here",)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_INPUTS: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "missing model": (lambda m, d, t: [t / "no.pth", d], "--load_model: there is no file"),
    "missing data": (lambda m, d, t: [m, t / "no.jsonl"], "--data_file: there is no file"),
    "no arguments": (lambda m, d, t: [], "no model given: rwkv-peft train model.pth data.jsonl"),
    "three arguments": (lambda m, d, t: [m, d, "x"], "'x' is one argument too many"),
    "truncated model": (
        lambda m, d, t: [write(t / "cut.pth", m.read_bytes()[:5000]), d],
        "cut.pth is truncated",
    ),
    "model that runs code": (
        lambda m, d, t: [torch.save({"emb.weight": RunsCode()}, t / "e.pth") or t / "e.pth", d],
        "would run code of",
    ),
    "wrong version": (
        lambda m, d, t: [m, d, "--my_testing", "x060"],
        "--my_testing x060 contradicts",
    ),
    "wrong model config": (lambda m, d, t: [m, d, "--n_layer", 12], "--n_layer 12 contradicts"),
    "empty data": (lambda m, d, t: [m, write(t / "e.jsonl", b"")], "the file is empty"),
    "broken line": (
        lambda m, d, t: [m, write(t / "b.jsonl", b'{"text": "a"}\n{"text\n')],
        "b.jsonl:2: not JSON",
    ),
    "row without text": (
        lambda m, d, t: [m, write(t / "b.jsonl", b'{"prompt": "a"}\n')],
        "b.jsonl:1: no known form has the keys of this row (prompt)",
    ),
    "nothing to train": (
        lambda m, d, t: [m, write(t / "b.jsonl", b'{"text": ""}\n')],
        "no trainable token",
    ),
    "unknown flag": (
        lambda m, d, t: [m, d, "--micro_bzs", 3],
        "unknown flag --micro_bzs: did you mean --micro_bsz?",
    ),
    "unknown key": (
        lambda m, d, t: [m, d, "--config", write(t / "c.yaml", b"micro_bzs: 3\n")],
        "unknown key micro_bzs: did you mean micro_bsz?",
    ),
    "missing config": (lambda m, d, t: ["--config", t / "no.yaml"], "does not exist"),
    "no number": (lambda m, d, t: [m, d, "--lr_init", "fast"], "--lr_init: got fast, allowed is a"),
    "closed choice": (
        lambda m, d, t: [m, d, "--precision", "fp8"],
        "--precision: got fp8, allowed is auto, fp32, tf32, bf16, fp16",
    ),
    "broken JSON": (lambda m, d, t: [m, d, "--peft_config", "{r:"], "--peft_config: got {r:"),
    "negative": (lambda m, d, t: [m, d, "--micro_bsz", -1], "--micro_bsz must be above 0, got -1"),
    "zero divided by zero": (lambda m, d, t: [m, d, "--adam_eps", 0], "--adam_eps must be above 0"),
    "unavailable op": (lambda m, d, t: [m, d, "--op", "fla"], "op='fla' needs a GPU: use --op"),
    "unknown op": (lambda m, d, t: [m, d, "--op", "tpu"], "op='tpu' is not a backend of wkv7"),
    "no such device": (lambda m, d, t: [m, d, "--accelerator", "cuda"], "--accelerator cuda"),
    "a strategy of one device": (
        lambda m, d, t: [m, d, "--devices", 2, "--strategy", "single"],
        "is for one device, and there are 2 devices: use one of ddp, fsdp",
    ),
    "missing adapter": (
        lambda m, d, t: [m, d, "--load_adapter", t / "no"],
        "there is no adapter",
    ),
    "adapter with options": (
        lambda m, d, t: [m, d, "--load_adapter", t, "--peft_config", '{"r": 4}'],
        "--load_adapter brings its own method and options",
    ),
    "target that is none": (
        lambda m, d, t: [m, d, "--peft", "lora", "--peft_config", '{"target_modules":["q"]}'],
        "'q' is not a module of this model",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_clear_line_and_leaves_nothing_written(
    name: str,
    cli: Cli,
    model_file: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.accelerator.is_available() and name in ("unavailable op", "no such device"):
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    make_arguments, message = BAD_INPUTS[name]
    arguments = make_arguments(model_file, data_file, tmp_path)
    before = sorted(os.listdir(tmp_path))
    done = cli("train", *arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1 and done.err.endswith("\n")
    assert message in done.err
    assert done.out == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_ends_training_with_one_line_and_no_part_of_a_file(
    model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_bytes(b"of the user")
    # a limit on the size of files fails a write just as a full disk does
    code = (
        "import resource, signal, sys\n"
        "from rwkv_peft.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["train", str(model_file), str(data_file), "--proj_dir", str(folder)]
    arguments += ["--epoch_count", "1", "--peft", "lora", "--peft_config", '{"r": 8}']
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {folder / 'rwkv-0.pth'}: File too large")
    assert (folder / "notes.txt").read_bytes() == b"of the user"
    assert not (folder / "rwkv-0.pth").exists()
    assert not [p for p in folder.rglob("*") if p.name.endswith((".tmp", ".new"))]
    assert (folder / "rwkv-0-adapter" / "adapter_model.safetensors").exists()


def test_a_folder_that_cannot_be_made_is_one_line(
    cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = cli("train", model_file, data_file, "--proj_dir", tmp_path / "file" / "out")
    assert done.code == 2
    assert done.err.startswith("error: ") and str(tmp_path / "file") in done.err
    assert done.err.count("\n") == 1


def test_the_short_form_chooses_the_rest_and_says_why(
    cli: Cli, model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("train", model_file, data_file, "--epoch_count", 1, "--accelerator", "cpu")
    assert done.code == 0, done.err
    for chosen in ("proj_dir = out", "precision = ", "peft = lora", "ctx_len = ", "lr_init = "):
        assert f"chosen: {chosen}" in done.err
    assert "op: torch" in done.err
    assert "plan: 1 epoch of " in done.err
    assert (tmp_path / "out" / "rwkv-0.pth").exists()
    again = cli("train", model_file, data_file, "--epoch-count", 1, "--accelerator=cpu")
    assert "chosen: proj_dir = out-2 (the first free name)" in again.err


def test_train_py_takes_the_flags_of_an_old_script(
    model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--load_model", str(model_file)]
    command += ["--data_file", str(data_file), "--proj_dir", "out", "--data_type", "jsonl"]
    command += ["--vocab_size", "320", "--n_layer", "2", "--n_embd", "128", "--ctx_len", "64"]
    command += ["--micro_bsz", "2", "--epoch_steps", "2", "--epoch_count", "1", "--epoch_save", "1"]
    command += ["--lr_init", "1e-5", "--lr_final", "1e-5", "--warmup_steps", "0", "--beta1", "0.9"]
    command += ["--beta2", "0.99", "--adam_eps", "1e-8", "--accelerator", "cpu", "--devices", "1"]
    command += ["--precision", "bf16", "--my_testing", "x070", "--grad_cp", "1", "--peft", "lora"]
    command += ["--peft_config", '{"r":8,"lora_alpha":32,"lora_dropout":0.05}', "--merge", "1"]
    command += ["--dataload", "pad", "--loss_mask", "pad", "--op", "torch", "--train_type", "none"]
    command += ["--strategy", "deepspeed_stage_1", "--num_nodes", "1", "--weight_decay", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "loss_data.jsonl").read_text().splitlines()) == 2
    merged, base = read_weights(tmp_path / "out" / "rwkv-0.pth"), read_weights(model_file)
    assert [(n, x.dtype) for n, x in merged.items()] == [(n, x.dtype) for n, x in base.items()]


def test_flags_overrule_the_config_file(
    cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"load_model: {model_file}\ndata_file: {data_file}\nproj_dir: {tmp_path / 'out'}\n"
        "epoch_count: 3\nepoch_steps: 1\npeft: lora\npeft_config:\n  r: 2\n"
    )
    done = cli("train", "--config", config, "--epoch_count", 1)
    assert done.code == 0, done.err
    saved = (tmp_path / "out" / "config.yaml").read_text()
    assert "epoch_count: 1\n" in saved and "r: 2\n" in saved
    adapter = json.loads((tmp_path / "out" / "rwkv-0-adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 2


def test_merge_command_gives_the_file_that_training_wrote(
    cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("train", model_file, data_file, "--proj_dir", out, "--epoch_count", 1).code == 0
    arguments = ("--base_model", model_file, "--adapter", out / "rwkv-0-adapter")
    done = cli("merge", *arguments, "--output", tmp_path / "merged.pth")
    assert done.code == 0, done.err
    one, other = read_weights(tmp_path / "merged.pth"), read_weights(out / "rwkv-0.pth")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert cli("merge", *arguments).err == (
        "error: --output is missing: rwkv-peft merge --base_model B --adapter DIR --output O\n"
    )


def test_inspect_tells_a_files_model_config_and_what_is_odd(
    cli: Cli, make_model_file: Callable[..., Path]
) -> None:
    path = make_model_file()
    facts = json.loads(cli("inspect", path, "--json").out)
    assert (facts["version"], facts["n_layer"], facts["n_embd"]) == ("x070", 2, 128)
    assert facts["dtype"] == {"bfloat16": len(read_weights(path))}
    assert facts["parameters"] == sum(x.numel() for x in read_weights(path).values())
    assert any("vocabulary 320" in odd for odd in facts["odd"])
    weights = dict(torch.load(path))
    weights["emb.weight"] = weights["emb.weight"].float()
    weights["emb.weight"][3, 4] = float("nan")
    del weights["ln_out.bias"]
    torch.save(weights, path)
    text = cli("inspect", path).out
    assert "emb.weight holds values that are not finite" in text
    assert "missing ln_out.bias" in text
    assert "tensors of several types" in text


@pytest.mark.parametrize(
    ("words", "is_json"),
    [(["--json"], True), (["--json", "true"], True), (["--json=false"], False), ([], False)],
)
def test_a_flag_that_is_true_or_false_needs_no_value(
    words: list[str], is_json: bool, cli: Cli, model_file: Path
) -> None:
    done = cli("inspect", *words, "--file", model_file)
    assert done.code == 0 and done.out.startswith("{") == is_json
    wrong = cli("inspect", "--file", model_file, "--json", "maybe")
    assert wrong.err == "error: --json: got maybe, allowed is true or false\n"


def test_inspect_reads_the_older_versions(cli: Cli, make_model_file: Callable[..., Path]) -> None:
    path = make_model_file(version="x060", ranks={"maa": 16, "decay": 32}, dim_ffn=448)
    facts = json.loads(cli("inspect", path, "--json").out)
    assert (facts["version"], facts["n_head"], facts["head_size"]) == ("x060", 2, 64)
    assert facts["ranks"] == {"maa": 16, "decay": 32}
    assert facts["odd"] == ["vocabulary 320, official files have 65536"]


def test_init_makes_a_model_that_loads_with_the_loss_of_a_guess(cli: Cli, tmp_path: Path) -> None:
    import math

    import rwkv_peft

    path = tmp_path / "new.pth"
    done = cli("init", path, "--n_layer", 2, "--n_embd", 128, "--vocab_size", 512)
    assert done.code == 0, done.err
    model = rwkv_peft.load_model(path)
    tokens = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1])[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(512), rel=0.1)
    assert "not a multiple of the head size" in cli("init", path, "--n_embd", 100).err


def test_generate_repeats_itself_at_temperature_0_and_prints_json(
    cli: Cli, model_file: Path
) -> None:
    arguments = ("--load_model", model_file, "--prompt", "ab", "--max_tokens", 9)
    first = cli("generate", *arguments, "--temperature", 0)
    assert first.code == 0, first.err
    answer = json.loads(cli("generate", *arguments, "--temperature", 0, "--json").out)
    assert answer["prompt"] == "ab"
    assert answer["text"] + "\n" == first.out
    drawn = [cli("generate", *arguments, "--random_seed", s).out for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "--prompt is empty" in cli("generate", "--load_model", model_file).err


def test_generate_with_an_adapter_gives_the_merged_models_text(
    cli: Cli, make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    base, out = make_model_file("float.pth", dtype=torch.float32), tmp_path / "out"
    settings = ("--epoch_count", 4, "--lr_init", 1e-2, "--precision", "fp32", "--merge", 1)
    assert cli("train", base, data_file, "--proj_dir", out, *settings).code == 0
    arguments = ("--prompt", "row 3:", "--max_tokens", 15, "--temperature", 0)
    arguments += ("--precision", "fp32")
    merged = cli("generate", "--load_model", out / "rwkv-3.pth", *arguments)
    adapter = ("--adapter", out / "rwkv-3-adapter")
    assert merged.code == 0, merged.err
    assert cli("generate", "--load_model", base, *adapter, *arguments).out == merged.out
    assert cli("generate", "--load_model", base, *arguments).out != merged.out


def test_chat_answers_each_line_of_a_pipe(model_file: Path) -> None:
    command = [sys.executable, "-m", "rwkv_peft.cli.main", "chat", str(model_file)]
    command += ["--max_tokens", "5", "--accelerator", "cpu"]
    done = subprocess.run(command, input="hi\nthere\n\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Assistant:") == 2


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from rwkv_peft.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'peft', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "merge", "generate", "chat", "inspect", "init", "doctor", "demo"):
        assert f"rwkv-peft {command}" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("rwkv-peft 0.")


def test_help_of_train_explains_every_flag(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from rwkv_peft.config import TrainConfig

    with pytest.raises(SystemExit) as caught:
        cli("train", "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in fields(TrainConfig):
        assert f"--{field.name}" in text
    assert "The official weights to start from" in text


def test_packages_of_others_say_nothing_of_what_is_not_used(cli: Cli) -> None:
    import logging

    assert cli("--version").code == 0
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)


def test_an_unknown_command_is_met_with_the_nearest(cli: Cli) -> None:
    assert cli("trai").err == "error: unknown command 'trai': did you mean train?\n"
    assert cli("trai").code == 2


@pytest.mark.parametrize("first", ["{model}", "data.jsonl", "--model", "-m"])
def test_a_line_without_a_command_is_told_what_comes_first(
    first: str, cli: Cli, model_file: Path
) -> None:
    first = first.format(model=model_file)
    assert cli(first, "data.jsonl").err == (
        f"error: '{first}' is no command, which comes first: rwkv-peft train model.pth data.jsonl\n"
    )


@pytest.mark.parametrize("command", ["train", "chat", "data", "merge", "eval"])
def test_help_speaks_no_python(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for word in ("Optional", "Literal", "Union", "None", "null", "list[", "dict[", "(type:"):
        assert word not in text
    assert text.startswith(f"usage: rwkv-peft {command} [")


def test_an_answer_ends_with_one_line_break(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import rwkv_peft.api
    import rwkv_peft.generation.engine

    pieces = [" a", "\n\n", "b \n", "\n", "\n"]
    monkeypatch.setattr(rwkv_peft.api, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(rwkv_peft.generation.engine, "stream", lambda *_, **__: pieces)
    assert cli("generate", "m.pth", "--prompt", "x").out == " a\n\nb\n"


def test_numbers_that_are_chosen_and_counted_read_well(
    cli: Cli, model_file: Path, make_data_file: Callable[..., Path], tmp_path: Path
) -> None:
    line = ("train", model_file, make_data_file(["one text"]), "--proj_dir", tmp_path / "out")
    done = cli(*line, "--lr_init", 1e-5, "--epoch_count", 1)
    assert done.code == 0, done.err
    assert "chosen: lr_final = 1e-06 (a tenth of lr_init)" in done.err
    assert "data: 1 document, " in done.err
    assert "plan: 1 epoch of 1 micro-batch of 1 row, 1 optimizer step\n" in done.err
