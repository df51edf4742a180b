"""Settings in YAML and templates in Jinja, damaged by chance or made to do harm."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rwkv_peft.cli.generate import GenerateOptions
from rwkv_peft.cli.parse import parse
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import find_template
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.folder import read_settings
from rwkv_peft.yaml_file import read_yaml
from tests.fuzz.damage import FULL, QUICK, run, spoil, spoil_value

SETTINGS: dict[str, Any] = {
    "load_model": "base.pth",
    "data_file": "data.jsonl",
    "proj_dir": "out",
    "peft_config": {"r": 8, "target_modules": ["key"]},
    "mask_id": {"mask0": "a", "mask1": "b"},
    "sft_field": ["a", "b"],
    "ctx_len": 512,
    "lr_init": 1e-4,
    "template": "chat",
    "epoch_begin": 0,
    "epoch_count": 1,
}
# a list of lists of lists, of which a few lines stand for 8^11 values
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
)
TURNS = [Turn("user", "hello aaa"), Turn("assistant", "b")]
TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' ~ m.content|trim }}
{% else %}{% set ns = namespace(x=m.content) %}{% generation %}{{ ns.x }}{% endgeneration %}
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<a>' * 1 }}{% endif %}"""


def check_settings(seeds: range, folder: Path) -> set[str]:
    path, results = folder / "config.yaml", set()
    for seed in seeds:
        rng = random.Random(seed)
        settings = SETTINGS if rng.random() < 0.3 else spoil_value(SETTINGS, rng)
        raw = yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass")
        path.write_bytes(spoil(raw, rng))
        read_settings(folder)
        given = ["--config", str(path)]
        results.add(run(lambda g=given: parse(TrainConfig, g, command="train")))  # type: ignore[misc]
    return results


def test_damaged_settings_are_refused_in_one_line_or_read(tmp_path: Path) -> None:
    assert check_settings(range(QUICK), tmp_path) == {"read", "refused"}


@pytest.mark.slow
def test_thousands_of_damaged_settings(tmp_path: Path) -> None:
    assert check_settings(range(10_000, 10_000 + FULL), tmp_path) == {"read", "refused"}


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a\n  b: *a", "[" * 900, "x" * (2 << 20)])
def test_yaml_that_stands_for_too_much_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert run(lambda: read_yaml(path)) == "refused"
    assert run(lambda: parse(TrainConfig, ["--config", str(path)], command="train")) == "refused"
    assert read_settings(tmp_path) is None


def test_names_in_yaml_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ctx_len: &n 64\nmicro_bsz: *n\n")
    config = parse(TrainConfig, ["--config", str(tmp_path / "a.yaml")], command="train")
    assert (config.ctx_len, config.micro_bsz) == (64, 64)


def check_templates(seeds: range, folder: Path) -> set[str]:
    results = set()
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / f"{seed}.jinja"
        path.write_bytes(spoil(TEMPLATE.encode(), rng))

        def render(name: str = str(path)) -> None:
            template = find_template(name)
            template.render(TURNS)
            template.prompt(TURNS[:1])
            assert isinstance(list(template.stops), list)

        results.add(run(render))
        path.unlink()
    return results


def test_a_damaged_template_is_refused_in_one_line_or_used(tmp_path: Path) -> None:
    assert check_templates(range(QUICK), tmp_path) == {"read", "refused"}


@pytest.mark.slow
def test_thousands_of_damaged_templates(tmp_path: Path) -> None:
    assert check_templates(range(10_000, 10_000 + FULL), tmp_path) == {"read", "refused"}


GROW = (
    "{%% set ns = namespace(x='aaaaaaaa') %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"
)
LONG = "{% set x = 'a' * 900000 %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('aaaa') }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10 ** 10 ** 8 ** 8 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ 'x'|center(10**9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'|indent(10**9) }}",
        "{{ messages|tojson(indent=10**9) }}",
        "{{ range(10**9) }}",
        GROW % "{% set ns.x = ns.x ~ ns.x %}",
        GROW % "{% set ns.x = ns.x + ns.x %}",
        GROW % "{% set ns.x = ns.x.replace('a', ns.x) %}",
        GROW % "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
        LONG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
        LONG + "{{ ([x] * 99999)|join }}",
        LONG + "{{ x|join(x) }}",
        LONG + "{{ x.join(x) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_without_end_or_measure_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(source)
    assert run(lambda: find_template(str(path)).render(TURNS)) == "refused"


def test_a_template_may_have_stars_and_long_numbers_in_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ '**%s**:%s 12345\n' % (m.role, m.content) }}{% endfor %}"
    )
    pieces = find_template(str(path)).render(TURNS)
    assert "".join(p.text for p in pieces) == "**user**:hello aaa 12345\n**assistant**:b 12345\n"


def test_a_template_beside_a_downloaded_model_is_used_only_if_a_run_put_it_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "evil.jinja").write_text("evil")
    folder = tmp_path / "model"
    folder.mkdir()
    options = GenerateOptions(load_model=str(folder / "rwkv-0.pth"))

    def template_of(**settings: Any) -> str:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return options.run_template().name

    # of another program, or made by hand
    assert template_of(template=str(tmp_path / "evil.jinja")) == "chat"
    assert template_of(template="template.jinja") == "chat"
    run_settings = {"proj_dir": "out", "epoch_begin": 0, "epoch_count": 1}
    assert template_of(template="document", **run_settings) == "document"
    for name in (str(tmp_path / "evil.jinja"), "../evil.jinja", 5, "out/template.jinja"):
        with pytest.raises(ConfigError, match="not used unasked"):
            template_of(template=name, **run_settings)
    (folder / "template.jinja").symlink_to(tmp_path / "evil.jinja")
    with pytest.raises(ConfigError, match="not used unasked"):
        template_of(template="out/template.jinja", **run_settings)
    (folder / "template.jinja").unlink()
    (folder / "template.jinja").write_text("{{ messages[0].content }}")
    assert template_of(template="out/template.jinja", **run_settings) == str(
        folder.resolve() / "template.jinja"
    )


def test_odd_characters_and_values_in_rows_are_told_and_skipped(
    cli: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    rows = [
        '{"messages": [{"role": "\\ud800", "content": "a"}]}',
        '{"messages": [{"role": "\\u001b[2J", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": '
        '{"properties": 5}}]}',
        '{"text": ' + "[" * 100_000 + "}",
        '{"text": "good"}',
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    for template in ("chat", tmp_path / "own.jinja"):
        given = ("--on_bad_row", "skip", "--max_untrained", 1, "--template", template)
        done = cli("data", tmp_path / "data.jsonl", *given)
        assert done.code == 0, done.err
        assert "\x1b" not in done.out + done.err and "\ud800" not in done.out + done.err
