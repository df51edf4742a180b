"""What is said in another language: every message of the files that have a catalogue."""

import ast
import gettext
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_peft import language
from rwkv_peft.assets import LOCALES
from rwkv_peft.cli.main import COMMANDS
from rwkv_peft.language import choose_language, find_language

PACKAGE = Path(language.__file__).parent
CATALOGUE = LOCALES / "zh" / "LC_MESSAGES" / "rwkv_peft.po"
# files all of whose messages are translated; others are in English so far
COVERED = ("cli/main.py", "training/display.py", "training/ending.py")


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    yield
    choose_language("en")


def messages() -> set[str]:
    found = set(COMMANDS.values())
    for name in COVERED:
        for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) == "_"
            if is_call and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
                found.add(node.args[0].value)  # type: ignore[attr-defined]
    return found


def read_catalogue() -> dict[str, str]:
    text = CATALOGUE.read_text(encoding="utf-8")
    pairs = re.findall(r'^msgid "(.+)"\nmsgstr "(.*)"$', text, re.M)
    return {a.replace('\\"', '"'): b.replace('\\"', '"') for a, b in pairs}


def test_every_message_is_translated_and_keeps_its_names() -> None:
    catalogue = read_catalogue()
    assert messages() == set(catalogue)
    for message, said in catalogue.items():
        assert re.search("[一-鿿]", said), message
        assert sorted(re.findall(r"{\w+}", said)) == sorted(re.findall(r"{\w+}", message))
        # flags and commands are the same in every language
        if message != "--lang zh speaks Chinese.":
            assert set(re.findall(r"--\w+", said)) == set(re.findall(r"--\w+", message))


def test_the_catalogue_that_is_read_is_the_one_that_is_edited() -> None:
    with open(CATALOGUE.with_suffix(".mo"), "rb") as file:
        compiled = gettext.GNUTranslations(file)
    for message, said in read_catalogue().items():
        assert compiled.gettext(message) == said


def test_the_language_comes_from_a_flag_or_the_environment(
    cli: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", SimpleNamespace(encoding="utf-8"))
    assert find_language({"LANG": "zh_CN.UTF-8"}) == find_language({"LC_ALL": "zh_TW"}) == "zh"
    assert find_language({"LANG": "de_DE.UTF-8"}) == find_language({}) == "en"
    assert find_language({"LC_ALL": "C", "LANG": "zh_CN"}) == "en"
    monkeypatch.setattr("sys.stderr", SimpleNamespace(encoding="latin-1"))
    assert find_language({"LANG": "zh_CN"}) == "en"
    monkeypatch.undo()
    assert "与模型对话" in cli("--lang", "zh", "--help").out
    assert "与模型对话" in cli("--help", "--lang=zh_CN").out
    assert "talk with a model" in cli("--help", "--lang", "en").out
    wrong = cli("--help", "--lang", "tlh")
    assert (wrong.code, wrong.err) == (2, "error: --lang tlh: allowed is en, zh\n")


def test_a_run_speaks_chinese_from_its_steps_to_its_end(
    cli: Callable[..., SimpleNamespace], model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    limits = ("--epoch_count", 1, "--accelerator", "cpu", "--lang", "zh")
    done = cli("train", model_file, data_file, "--proj_dir", tmp_path / "out", *limits)
    assert done.code == 0, done.err
    for part in ("学习率", "完成，用时", "与它对话：rwkv-peft chat", "完整的微调模型"):
        assert part in done.err, part
