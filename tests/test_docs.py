"""Every command and example of README.md and docs/ runs."""

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.cli.main import main
from rwkv_peft.cli.parse import parse
from rwkv_peft.cli.train import TrainOptions
from rwkv_peft.device import TYPES
from rwkv_peft.exports.formats import FORMATS
from tests.messages import read_catalogue

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "README_zh.md")
CHAT_LINE = "rwkv-peft chat out"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [x for name, x in re.findall(r"```(\w*)\n(.*?)```", text, re.S) if name == language]


def commands(page: str) -> list[str]:
    """The command lines of a page; a quoted argument may span lines."""
    joined = "".join(blocks(page, "bash"))
    return re.findall(r"^(?:rwkv-peft|python3)\b(?:[^\n\"]|\"[^\"]*\")*$", joined, re.M)


def run(line: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )


def test_both_readmes_hold_the_same_commands() -> None:
    english, chinese = (blocks(page, "bash") for page in PAGES)
    assert english == chinese
    assert len(commands("README.md")) == 19


def test_the_commands_of_the_readme_run_in_their_order(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    make_model_file("model.pth", vocab_size=1000)
    (tmp_path / "data.jsonl").write_text(blocks("README.md", "json")[0] * 8, encoding="utf-8")
    lines = [line for line in commands("README.md") if line.startswith("rwkv-peft")]
    for line in lines:
        done = run(line, tmp_path, given="hello\n\n" if line == CHAT_LINE else "")
        assert done.returncode == 0, f"{line}: {done.stderr}"
    merged, saved = read_weights(tmp_path / "merged.pth"), read_weights(tmp_path / "out/rwkv-0.pth")
    assert all((merged[name] == saved[name]).all() for name in saved)


def test_ci_runs_the_readmes_own_line_of_tests() -> None:
    line = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep -E '^python3 -m venv .*pytest' README.md" in line
    found = [c for c in commands("README.md") if "pytest" in c]
    assert found == [
        "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt '.[test]' && "
        ".venv/bin/pytest -n 2 --dist loadfile"
    ]


@pytest.mark.slow
def test_the_first_line_of_the_readme_installs_and_learns(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    line = next(c for c in commands("README.md") if "demo" in c)
    done = run(line.replace("python3", sys.executable, 1), clone)
    assert done.returncode == 0, done.stderr
    assert "Thus the Devil's Dictionary." in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "setting_up", "locale", "said"),
    [
        ("README.md", "docs/install.md", "C.UTF-8", "done in"),
        ("README_zh.md", "docs/zh/install.md", "zh_CN.UTF-8", "完成，用时"),
    ],
)
def test_the_lines_of_the_readme_can_be_pasted_in_their_order(
    page: str,
    setting_up: str,
    locale: str,
    said: str,
    make_model_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    make_model_file("model.pth", vocab_size=1000)
    (tmp_path / "data.jsonl").write_text(blocks("README.md", "json")[0] * 8, encoding="utf-8")
    # as a person pastes them; the tests are run by CI with the very line
    bare, get, *pasted = [block for block in blocks(page, "bash") if "pytest" not in block]
    assert "apt" in bare and "git clone ADDRESS rwkv-peft\n" in get
    session = "sudo() { :; }\nset -e\n" + bare + get.replace("ADDRESS", shlex.quote(str(ROOT)))
    # what a person brings; then the other way in, of the page on setting up, and that of the readme
    session += "mv ../model.pth ../data.jsonl .\n" + blocks(setting_up, "")[0] + "".join(pasted)
    environment = {**os.environ, "LC_ALL": locale}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", session], cwd=tmp_path, input="hello\n", capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rwkv-peft" / "merged.pth").exists()
    assert said in done.stderr


# page -> its commands that run in the order of the pages, after those of the README
PAGE_FOLDERS = ("docs", "docs/zh")


def page_commands() -> list[str]:
    """Every command in a block of code of a page of docs, each once."""
    lines = (line for line in page_lines() if re.match(r"rwkv-peft |\w+=\S+ .* sh ", line))
    return list(dict.fromkeys(line.partition("  #")[0].strip() for line in lines))


def page_lines() -> list[str]:
    """Every line in a block of code of a page of docs, but for trees of folders."""
    found: list[str] = []
    for folder in PAGE_FOLDERS:
        for page in sorted((ROOT / folder).glob("*.md")):
            # the language too, as the end of one block is no beginning of another
            for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text("utf-8"), re.S):
                lines = block.replace("\\\n", " ").splitlines()
                is_tree = language not in ("", "bash") or lines[0].endswith("/")
                found += [] if is_tree else filter(None, lines)
    return found


# lines of the pages that are run in another way, or cannot be run here
ELSEWHERE = (
    # pasted, above
    r"python3 -m venv \.venv|\. \.venv/bin/activate|pip install -c constraints\.txt \.",
    # a host is not named
    r"pip install -i MIRROR -c constraints\.txt \.|pip config set global\.index-url MIRROR",
    # need several machines; their arguments are read below
    r"torchrun .*|srun .*|#SBATCH .*",
    # a part of a program
    r"result = rwkv_peft\.train\(config\)|if result\.signal:|sys\.exit\(.*\)",
)


def test_no_line_of_the_pages_is_left_out() -> None:
    known = set(page_commands())
    left = {line.partition("  #")[0].strip() for line in page_lines()} - known
    assert [x for x in left if not any(re.fullmatch(rf"\s*(?:{p})", x) for p in ELSEWHERE)] == []
    for line in left:
        if line.startswith(("torchrun", "srun")):
            words = shlex.split(re.split(r"rwkv-peft |-m rwkv_peft\.cli\.main ", line)[1])
            given = parse(
                TrainOptions, words[1:], command="train", positional=("load_model", "data_file")
            )
            assert (words[0], given.load_model, given.data_file) == (
                "train", "model.pth", "data.jsonl",
            )  # fmt: skip
    # those of the Chinese pages are among them
    chinese = [x for x in (ROOT / "docs" / "zh").glob("*.md") if "```" in x.read_text("utf-8")]
    assert {x.stem for x in chinese} == {"data", "install", "usage"}
    assert "rwkv-peft chat out" in known and "rwkv-peft doctor" in known and len(known) >= 21


def test_the_commands_of_the_pages_run(
    make_model_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from rwkv_peft.cli.main import main
    from tests.checkpoint.old_files import old_run

    monkeypatch.chdir(tmp_path)
    make_model_file("model.pth", vocab_size=1000)
    old, _ = old_run(tmp_path, Path("model.pth"), "lora")
    Path(old).rename("rwkv-0.pth")
    rows = blocks("README.md", "json")[0] * 8
    for name in ("data.jsonl", "book.jsonl"):
        Path(name).write_text(rows, encoding="utf-8")
    brief = ["--epoch_steps", "1", "--epoch_count", "1", "--accelerator", "cpu"]
    assert main(["train", "model.pth", "data.jsonl", "--proj_dir", "out", *brief]) == 0
    seen = 0
    for line in page_commands():
        if not line.startswith("rwkv-peft "):
            # of scripts, which tests/test_scripts.py runs; this one is known there
            assert re.search(r" sh scripts/run_\w+\.sh", line), line
            continue
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words += brief
        if "--resume" in words:
            given = words[words.index("--resume") + 1]
            settings = ["--save_every_steps", "1", "--random_seed", "1"]
            run = ["train", "model.pth", "data.jsonl", "--proj_dir", "out", *settings]
            shutil.rmtree("out", ignore_errors=True)
            assert main([*run, *words[-6:]]) == 0
            if given != "auto":
                Path("out/checkpoints/step-000001").rename(given)
            words = words[:-6]
        elif "--proj_dir" in words:
            shutil.rmtree(words[words.index("--proj_dir") + 1], ignore_errors=True)
        if words[0] == "chat":
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
            words += ["--max_tokens", "3"]
        assert main(words) == 0, line
        seen += 1
    assert seen == len(page_commands()) - 1


def test_the_example_of_the_library_page_runs(tmp_path: Path) -> None:
    (code,) = blocks("docs/library.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged.pth").exists()


def test_the_usage_page_names_every_file_and_exit_code_of_a_run() -> None:
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    for name in ("config.yaml", "train_log.txt", "loss_data.jsonl", "rwkv-K.pth", "130, 143"):
        assert name in text


def test_the_hardware_page_tells_of_every_device_that_can_be_asked_for() -> None:
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert [kind for kind in TYPES if f"`{kind}`" not in text and f" {kind}`" not in text] == []


def test_the_chinese_page_on_problems_has_the_messages_that_are_shown() -> None:
    said = [re.sub(r"\{[=+]?\d+\}|\s", "", text) for text in read_catalogue().values()]
    # of two messages
    said.append("没有参数")
    text = (ROOT / "docs" / "zh" / "problems.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line[:2] == "| "]
    assert len(rows) > 15
    for row in rows[1:]:
        # names, numbers and what is left out are no part of it
        parts = re.split(r"[\s…、：（）]|[A-Z]+\b|--|\b(?:nan|inf)\b|`.*?`", row)
        for part in filter(None, parts):
            assert any(part.removeprefix("是") in x for x in said), f"{row}: {part}"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_commands_of_the_page_on_exports_run(
    make_model_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_file("model.pth", vocab_size=1000)
    (tmp_path / "data.jsonl").write_text(blocks("README.md", "json")[0] * 8, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    train = "rwkv-peft train model.pth data.jsonl --proj_dir out"
    for line in (train, *commands("docs/exports.md")):
        # in this process, as each new one takes seconds to begin
        assert main(shlex.split(line)[1:]) == 0, line
    assert len(commands("docs/exports.md")) == 8


def test_the_page_on_exports_is_true_of_the_formats_and_the_readers() -> None:
    text = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    formats = {row[0].strip("`"): row[3].split(", ") for row in rows if len(row) == 4}
    for name, kind in FORMATS.items():
        assert formats[name] == list(kind.dtypes)
    versions = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    readers = {row[1].split("`")[1]: row[2] for row in rows if len(row) == 4 and row[1][:1] == "`"}
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "exports").glob("*.py"))
    assert len(readers) == 8
    for name, version in readers.items():
        assert f"{name}=={version}" in versions
        module = {"flash-linear-attention": "fla"}.get(name, name).replace("-", "_")
        asked = (f"import {module}", f"from {module}", f'"{module}.', f'"{module}"')
        assert any(words in tests for words in asked), name
