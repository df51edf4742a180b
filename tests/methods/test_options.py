"""Options of a method: each is served from training to the merged file, or refused before."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.adapter import attach_saved, write_adapter
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.catalog import check_saved, method_config
from tests.methods.test_catalog import TOKENS, VERSIONS, moved

MakeModel = Callable[..., Path]
# what is in the file, or how it is read, follows from each of these; the first are whole modules
SERVED: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "head": ("7", "lora", {"modules_to_save": ["head"]}, []),
    "emb, RWKV-6": ("6", "lora", {"modules_to_save": ["emb"]}, []),
    "norms, RWKV-5": ("5.2", "lora", {"modules_to_save": ["ln_x", "ln_out"]}, []),
    "beside parts": ("7", "miss", {"r": 8, "modules_to_save": ["head"]}, ["ln"]),
    "of loha": ("6", "loha", {"modules_to_save": ["ln_out"]}, []),
    "of dora": ("7", "lora", {"use_dora": True, "modules_to_save": ["head", "emb"]}, []),
    "a whole mixer": ("7", "lora", {"modules_to_save": ["ffn"]}, []),
    "of pissa": ("7", "pissa", {"r": 4, "modules_to_save": ["head", "ln_x"]}, []),
    "pissa with emb": ("7", "pissa", {"r": 4, "target_modules": ["key", "emb"]}, []),
    "tokens": ("7", "lora", {"trainable_token_indices": {"emb": [1, 2]}}, []),
    "parameters": ("7", "lora", {"target_parameters": ["att.key.weight"]}, []),
    "ranks": ("7", "lora", {"rank_pattern": {"att.key": 2}, "use_rslora": True}, []),
    "excluded": ("7", "lora", {"exclude_modules": ["att.key"]}, []),
    "a pattern of layers": ("7", "lora", {"target_modules": r"blocks\.(1)\..*key"}, []),
    "bias": ("7", "lora", {"bias": "all"}, []),
    "runtime": ("7", "lora", {"runtime_config": {"ephemeral_gpu_offload": False}}, []),
    "kasa": ("7", "lora", {"r": 4, "kasa_config": {"beta": 1e-3}}, []),
    "mica": ("7", "lora", {"init_lora_weights": "mica"}, []),
}


# official files are bf16: a method that reads the base must not read it more coarsely in merging
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SERVED)
def test_an_option_is_served_in_training_reloaded_and_merged(
    case: str, make_model_file: MakeModel, tmp_path: Path
) -> None:
    version, method, options, parts = SERVED[case]
    # what other tests have drawn before does not decide how large the values become
    torch.manual_seed(0)
    base, folder = make_model_file(**VERSIONS[version]), tmp_path / "adapter"
    model = rwkv_peft.load_model(base)
    trained = attach(model, method, options, train_parts=parts)
    moved(trained)
    wanted = model.eval()(TOKENS)[0].detach()
    write_adapter(folder, trained, trained, base=base)
    reloaded = rwkv_peft.load_model(base, adapter=folder)(TOKENS)[0]
    torch.testing.assert_close(reloaded, wanted, rtol=0, atol=1e-4)
    again = rwkv_peft.load_model(base, op="reference")
    assert set(attach_saved(again, folder)[0]) == set(trained)
    torch.testing.assert_close(again.eval()(TOKENS)[0], wanted, rtol=0, atol=1e-4)
    rwkv_peft.convert(folder, tmp_path / "converted", base)
    merged = tmp_path / "merged.pth"
    report = rwkv_peft.merge(base, tmp_path / "converted", merged, dtype="fp32")
    torch.testing.assert_close(rwkv_peft.load_model(merged)(TOKENS)[0], wanted, rtol=0, atol=1e-4)
    assert report.comparison is not None and report.comparison.max_difference < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamss", {}),
        ("frod", {}),
        ("psoft", {}),
        ("osf", {}),
        ("tinylora", {"save_projection": False}),
        ("supertuning", {}),
    ],
)
def test_a_method_that_reads_the_base_is_merged_as_it_was_trained_on_a_bf16_file(
    method: str, options: dict[str, Any], make_model_file: MakeModel, tmp_path: Path
) -> None:
    base = make_model_file()
    model = rwkv_peft.load_model(base)
    trained = attach(model, method, options)
    moved(trained)
    wanted = model.eval()(TOKENS)[0].detach()
    write_adapter(tmp_path / "adapter", trained, trained, base=base)
    rwkv_peft.merge(base, tmp_path / "adapter", tmp_path / "merged.pth", dtype="fp32")
    found = rwkv_peft.load_model(tmp_path / "merged.pth")(TOKENS)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": "8"}, "r must be a whole number, got '8'"),
    ("lora", {"r": 1.5}, "r must be a whole number, got 1.5"),
    ("lora", {"r": True}, "r must be a whole number, got True"),
    ("lora", {"r": None}, "r must be a whole number, got None"),
    ("lora", {"r": -1}, "positive integer"),
    ("lora", {"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
    ("lora", {"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
    ("lora", {"lora_dropout": 2}, r"must lie in \[0, 1\), got 2"),
    ("lora", {"lora_dropout": -0.1}, r"must lie in \[0, 1\), got -0.1"),
    ("lora", {"target_modules": 5}, "a list of strings or a string or null, got 5|a string or a"),
    ("lora", {"target_modules": [5]}, "target_modules must be .*strings"),
    ("lora", {"target_modules": "("}, "unterminated"),
    ("lora", {"rank_pattern": [1]}, "rank_pattern must be an object or null"),
    ("lora", {"rank_pattern": {"att.key": "x"}}, "TypeError"),
    ("lora", {"alpha_pattern": {"att.key": "x"}}, "TypeError"),
    ("lora", {"bias": "foo"}, "bias must be 'none' or 'all' or 'lora_only'"),
    ("lora", {"init_lora_weights": "foo"}, "init_lora_weights must be"),
    ("lora", {"use_dora": "yes"}, "use_dora must be true or false"),
    ("lora", {"modules_to_save": "head"}, "modules_to_save must be a list of strings or null"),
    ("lora", {"modules_to_save": ["nope"]}, "'nope' is not a module"),
    ("lora", {"runtime_config": 5}, "runtime_config must be an object"),
    ("lora", {"runtime_config": {"x": 1}}, "runtime_config has no option 'x'"),
    ("lora", {"kasa_config": {"beta": "x"}}, r"kasa_config\.beta must be a number"),
    ("lora", {"trainable_token_indices": {"emb": ["a"]}}, "whole numbers"),
    ("lora", {"trainable_token_indices": {"emb": [10**9]}}, "IndexError"),
    ("lora", {"alora_invocation_tokens": [5]}, "cannot be merged"),
    ("lora", {"lora_bias": True}, "no bias"),
    ("lora", {"arrow_config": {"top_k": 2}}, "several trained adapters"),
    ("lora", {"layer_replication": [[0, 1]]}, "layer_replication"),
    ("lora", {"eva_config": {}}, "a pass over data"),
    ("adamss", {"use_asa": True}, "use_asa|asa_target"),
    ("miss", {"r": "x"}, "r must be a whole number"),
    ("vera", {"r": -1}, "negative dimension"),
    ("trainable_tokens", {"token_indices": 5}, "a list of whole numbers"),
    ("road", {"variant": "x"}, "road_1"),
]


@pytest.mark.filterwarnings("ignore")
def test_a_value_of_a_wrong_type_or_size_is_one_line(model_file: Path) -> None:
    for method, options, message in WRONG:
        with pytest.raises(ConfigError, match=message) as caught:
            attach(rwkv_peft.load_model(model_file), method, options)
        assert "\n" not in str(caught.value), options


def test_a_method_with_an_endless_name_is_one_short_line() -> None:
    with pytest.raises(ConfigError) as caught:
        check_saved({"peft_type": "x" * 100_000})
    text = str(caught.value)
    assert text.startswith("its method xxx") and "letters left out" in text
    assert text.endswith("waveft") and len(text) < 3000


def test_numbers_that_peft_declares_whole_may_be_any() -> None:
    config: Any = method_config("lora", {"lora_alpha": 0.5, "lora_dropout": 0}, "x070")
    assert config.lora_alpha == 0.5


def test_a_bad_option_ends_a_run_before_it_writes(
    cli: Callable[..., SimpleNamespace], model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    for config in ('{"arrow_config": {"top_k": 2}}', '{"r": 1.5}'):
        given = ("--peft", "lora", "--peft_config", config, "--proj_dir", tmp_path / "out")
        done = cli("train", model_file, data_file, *given)
        assert done.code == 2 and done.err.strip().count("\n") == 0, done.err
        assert not (tmp_path / "out").exists()
