"""What is said in another language: every message of the program has its translation."""

import errno
import gettext
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_peft.language import choose_language, find_language, translate
from tests.messages import CATALOGUE, HOLE, PACKAGE, read_catalogue, read_messages, read_texts

Cli = Callable[..., SimpleNamespace]
CHINESE = re.compile("[一-鿿]")
# of the system, and what the code puts together of single words
OTHERS = {os.strerror(n) for n in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EISDIR)}
OTHERS |= {os.strerror(n) for n in (errno.ENOTDIR, errno.EROFS)}
OTHERS |= {"a checkpoint", "a model", "a state", "saved {0} and {1}"}
# said in the same words by Chinese readers
SAME = {"--peft none", "a state", "the state '{0}'", "the Modelfile", "Head size."}


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    yield
    choose_language("en")


def test_every_message_is_translated() -> None:
    known = read_catalogue()
    missing = {text: name for text, name in read_messages() if text not in known}
    assert missing == {}, "python tests/messages.py prints them for the catalogue"


def test_the_catalogue_has_no_message_that_the_program_has_no_more() -> None:
    texts = {text for path in PACKAGE.rglob("*.py") for text in read_texts(path)}
    texts |= {text for text, _ in read_messages()} | OTHERS
    assert [text for text in read_catalogue() if text not in texts] == []


def test_a_translation_keeps_what_changes_and_the_names_of_flags_and_files() -> None:
    for message, said in read_catalogue().items():
        assert (
            CHINESE.search(said)
            or message in SAME
            or "_" in message
            or not re.search("[a-z]{3}", said)
        ), message
        holes = [sorted(re.sub("[#=+]", "", x) for x in HOLE.findall(y)) for y in (said, message)]
        assert holes[0] == holes[1], message
        for name in (r"--\w+", r"\w+\.(?:pth|jsonl?|yaml|safetensors|py)\b", r"rwkv-peft [a-z]+"):
            found = set(re.findall(name, message))
            if message != "--lang zh speaks Chinese.":
                assert found <= set(re.findall(name, said, re.ASCII)), message
        # Chinese stands with the marks of Chinese
        assert not re.search("[一-鿿][,;:?!(] ?", said), said


def test_the_catalogue_that_is_read_is_the_one_that_is_edited() -> None:
    with open(CATALOGUE.with_suffix(".mo"), "rb") as file:
        compiled = gettext.GNUTranslations(file)
    for message, said in read_catalogue().items():
        assert compiled.gettext(message) == said


def test_a_text_is_translated_with_what_stands_in_it() -> None:
    for text, said in {
        "error: there is no file a.pth": "错误：没有文件 a.pth",
        "error: --load_model: there is no file my model.pth": (
            "错误：--load_model：没有文件 my model.pth"
        ),
        "chosen: ctx_len = 512 (the longest document has 1 token)": (
            "选定：ctx_len = 512（最长的文档有 1 个 token）"
        ),
        "epoch 0: loss 0.5, saved out/rwkv-0.pth; saved out/x": (
            "第 0 轮：损失 0.5，已保存 out/rwkv-0.pth；已保存 out/x"
        ),
        # of a user: words of the program in it are no message
        "  before: the device, and 3 tokens": "  训练前：the device, and 3 tokens",
        "many tokens": "many tokens",
        "no message: " * 500: "no message: " * 500,
        # a list is left as it is
        f"op='x' is not a backend of wkv7: use {', '.join('abcdefghijklmnopqrstuvwxyz')}": (
            f"op='x' 不是 wkv7 的后端：请用 {', '.join('abcdefghijklmnopqrstuvwxyz')}"
        ),
    }.items():
        choose_language("zh")
        assert translate(text) == said
        choose_language("en")
        assert translate(text) == text


def test_the_language_comes_from_a_flag_or_the_environment(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", SimpleNamespace(encoding="utf-8"))
    assert find_language({"LANG": "zh_CN.UTF-8"}) == find_language({"LC_ALL": "zh_TW"}) == "zh"
    assert find_language({"LANG": "de_DE.UTF-8"}) == find_language({}) == "en"
    assert find_language({"LC_ALL": "C", "LANG": "zh_CN"}) == "en"
    # a list, in which the first that is known counts, unless the locale is none
    for language, wanted in {"zh_CN:en": "zh", "fr:zh": "zh", "en_GB:zh": "en", "fr": "en"}.items():
        assert find_language({"LANG": "en_US.UTF-8", "LANGUAGE": language}) == wanted
    assert find_language({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en"}) == "en"
    assert (
        find_language({"LANG": "C", "LANGUAGE": "zh"}) == find_language({"LANGUAGE": "zh"}) == "en"
    )
    monkeypatch.setattr("sys.stderr", SimpleNamespace(encoding="latin-1"))
    assert find_language({"LANG": "zh_CN"}) == "en"
    monkeypatch.undo()
    assert "与模型对话" in cli("--lang", "zh", "--help").out
    assert "与模型对话" in cli("--help", "--lang=zh_CN").out
    assert "talk with a model" in cli("--help", "--lang", "en").out
    wrong = cli("--help", "--lang", "tlh")
    assert (wrong.code, wrong.err) == (2, "error: --lang tlh: allowed is en, zh\n")


def test_a_run_speaks_chinese_from_its_plan_to_its_end(
    cli: Cli, model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    limits = ("--epoch_count", 1, "--accelerator", "cpu", "--val_split", 0.3, "--lang", "zh")
    done = cli("train", model_file, data_file, "--proj_dir", tmp_path / "out", *limits)
    assert done.code == 0, done.err
    for part in ("学习率", "完成，用时", "与它对话：rwkv-peft chat", "完整的微调模型"):
        assert part in done.err, part
    assert [line for line in done.err.splitlines() if not CHINESE.search(line)] == []
    # what is kept is the same for every reader
    assert not CHINESE.search((tmp_path / "out" / "train_log.txt").read_text(encoding="utf-8"))


def test_errors_are_said_in_chinese(cli: Cli, model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": 3}\n', encoding="utf-8")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>", encoding="utf-8")
    for words in (
        ("train", "--epochs", 3),
        ("train", "--ctx_len", "long"),
        ("train", "none.pth", "none.jsonl"),
        ("train", model_file, tmp_path / "rows.jsonl"),
        ("train", tmp_path / "page.pth", tmp_path / "rows.jsonl"),
        ("chat",),
        ("merge", model_file, "--output", "x.pth"),
        ("inspect", tmp_path / "page.pth"),
        ("wrong",),
    ):
        done = cli(*words, "--lang", "zh")
        assert done.code == 2 and done.err.startswith("错误："), words
        # but for commands, flags and names
        rest = done.err.replace(str(tmp_path), "")
        assert not re.search(r"\b(?:is|the|of|and|has|it|no|give)\b", rest, re.ASCII), rest


@pytest.mark.parametrize("command", ["train", "chat", "merge", "data", "doctor"])
def test_help_is_in_chinese_and_fits_the_screen(
    command: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.cells import cell_len

    with pytest.raises(SystemExit):
        cli(command, "--help", "--lang", "zh")
    flags = capsys.readouterr().out.split("\n  --")
    texts = [line for flag in flags[1:] for line in flag.splitlines()[1:]]
    assert len(flags) >= 4 and all(map(CHINESE.search, flags))
    assert max(map(cell_len, texts)) <= 100
    assert not any(line.strip()[0] in "，。；：）、" for line in texts)


def test_the_catalogue_is_one_that_gettext_compiles(tmp_path: Path) -> None:
    import shutil

    if not shutil.which("msgfmt"):
        pytest.skip("gettext is not installed")
    subprocess.run(["msgfmt", "-c", str(CATALOGUE), "-o", str(tmp_path / "x.mo")], check=True)
