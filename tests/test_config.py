"""No number that is not finite is taken, by any command and however deep it stands."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.generation.sampling import Sampling

Cli = Callable[..., SimpleNamespace]
FLOATS = [f.name for f in fields(TrainConfig) if "float" in str(f.type)]


@pytest.mark.parametrize("value", [".nan", "1e400", "-1e999", "-.inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_flag_of_training_takes_no_such_number(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name}: got -?(nan|inf), allowed is a finite"):
        parse(TrainConfig, [f"--{name}={value}"], command="train")


def test_there_are_many_such_flags() -> None:
    assert {"lr_init", "lr_final", "weight_decay", "grad_clip", "beta1", "max_untrained"} <= {
        *FLOATS
    }


@pytest.mark.parametrize(
    "text",
    [
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 1e400}',
        '{"lora_dropout": .nan}',
        '{"lora_alpha": Infinity}',
        '{"alpha_pattern": {"key": -Infinity}}',
        '{"x": [1, {"y": .inf}]}',
    ],
)
def test_nor_do_the_options_of_a_method(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--peft_config: .*allowed is a finite number"):
        parse(TrainConfig, ["--peft", "lora", "--peft_config", text], command="train")


def test_nor_does_python() -> None:
    wrong: list[Callable[[float], Any]] = [
        lambda x: TrainConfig(lr_init=x),
        lambda x: TrainConfig(peft="lora", peft_config={"lora_alpha": x}),
        lambda x: Sampling(temperature=x),
        lambda x: Sampling(frequency=x),
    ]
    for make in wrong:
        for value in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(ConfigError, match="finite"):
                make(value)


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--load_model", "MODEL", "--prompt", "a", "--temperature", ".nan"),
        ("generate", "--load_model", "MODEL", "--prompt", "a", "--presence", "1e400"),
        ("chat", "MODEL", "--top_p", ".nan"),
        (
            "merge",
            "--base_model",
            "MODEL",
            "--adapter",
            "A",
            "--output",
            "O",
            "--weights",
            "[.nan]",
        ),
        (
            "merge",
            "--base_model",
            "MODEL",
            "--adapter",
            "A",
            "--output",
            "O",
            "--lora_alpha",
            ".inf",
        ),
        ("convert", "MODEL", "--base_model", "MODEL", "--output", "O", "--lora_alpha", ".nan"),
        ("data", "MODEL", "--max_untrained", ".nan"),
        ("train", "MODEL", "DATA", "--lora", "--lora_alpha", "nan"),
        ("train", "MODEL", "DATA", "--lora_config", '{"lora_alpha": NaN}'),
        ("train", "MODEL", "DATA:nan"),
        ("train", "MODEL", "DATA", "--random_seed", str(2**64)),
    ],
)
def test_nor_does_another_command(
    words: tuple[str, ...], cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    names = {"MODEL": str(model_file), "DATA": str(data_file), "DATA:nan": f"{data_file}:nan"}
    done = cli(*(names.get(word, word) for word in words))
    assert done.code == 2, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_nothing_is_no_value_but_where_it_leaves_a_choice_open(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{name}: null\n")
    (found,) = (f for f in fields(TrainConfig) if f.name == name)
    if any(x in str(found.type) for x in ("None", "Optional")):
        assert getattr(parse(TrainConfig, ["--config", str(path)], command="train"), name) is None
        return
    with pytest.raises(ConfigError, match=name) as caught:
        parse(TrainConfig, ["--config", str(path)], command="train")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"^--{name}: got nothing"):
        TrainConfig(**{name: None})
