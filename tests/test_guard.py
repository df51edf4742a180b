"""What may be written where, whatever the path says."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.guard import find_clash, require_free


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "base.pth"
    path.write_bytes(b"weights")
    return path


def spellings(base: Path) -> list[Path]:
    """Other paths of one file."""
    top = base.parent.parent
    (top / "link").symlink_to(base)
    (top / "chain").symlink_to(top / "link")
    (top / "linked").symlink_to(base.parent)
    os.link(base, top / "hard")
    others = [top / "link", top / "chain", top / "linked" / base.name, top / "hard"]
    return [base, base.parent / ".." / "in" / base.name, Path(os.path.relpath(base)), *others]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_refused_by_any_path(base: Path, overwrite: bool) -> None:
    for path in spellings(base):
        for given in (base, base.parent):
            with pytest.raises(ConfigError, match=r"is or holds .*, which is read"):
                require_free(path, inputs=[given], overwrite=overwrite)
    assert find_clash([base], [base.with_name("missing")]) is None


def test_a_folder_that_holds_an_input_is_refused(base: Path) -> None:
    for folder in (base.parent, base.parent.parent):
        with pytest.raises(ConfigError, match="which is read"):
            require_free(folder, inputs=[base], overwrite=True, owned=os.listdir(folder))


def test_a_new_file_in_the_folder_of_an_input_is_free(base: Path) -> None:
    require_free(base.parent / "new.pth", inputs=[base, base.parent])
    require_free(base.parent.parent / "new" / "folder" / "new.pth", inputs=[base])


def test_what_is_there_is_replaced_only_when_that_is_said(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output .*exists: .*--overwrite 1"):
        require_free(base)
    require_free(base, overwrite=True)
    (base.parent / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists"):
        require_free(base.parent / "dangling")


def test_what_is_no_regular_file_is_never_replaced(base: Path) -> None:
    os.mkfifo(base.parent / "fifo")
    (base.parent / "null").symlink_to("/dev/null")
    for path in (base.parent / "fifo", base.parent / "null", Path("/dev/null"), base.parent):
        with pytest.raises(ConfigError, match="is there and no regular file"):
            require_free(path, overwrite=True)
    for path in (base, base.parent / "fifo"):
        with pytest.raises(ConfigError, match="is there and no folder"):
            require_free(path, overwrite=True, owned=["a"])


def test_a_folder_with_files_of_the_user_is_never_replaced(base: Path) -> None:
    require_free(base.parent, overwrite=True, owned=["base.pth", "more"])
    (base.parent / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files too \(notes\.txt\)"):
        require_free(base.parent, overwrite=True, owned=["base.pth", "more"])


@pytest.mark.parametrize("name", ["base.pth/x.pth", "n" * 300, "n" * 250, "a\0b"])
def test_a_name_that_cannot_be_is_refused(base: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="choose another"):
        require_free(base.parent / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_the_right_to_write_is_refused(base: Path) -> None:
    base.parent.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        require_free(base.parent / "deep" / "new.pth")


@pytest.mark.parametrize(
    "name", ["load_model", "proj_dir", "data_file", "load_adapter", "data_cache"]
)
def test_paths_that_cannot_be_meant_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., SimpleNamespace]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(ConfigError, match="NUL character"):
        TrainConfig(**{name: "a\0b"})
    (tmp_path / "c.yaml").write_text(f"{name}: ~/x.pth", encoding="utf-8")
    done = cli("train", "--config", "c.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"--{name} ~/x.pth: only a shell reads ~" in done.err
    assert "write /home/me/x.pth" in done.err
    (tmp_path / "nul.yaml").write_text(f'{name}: "a\\0b"', encoding="utf-8")
    done = cli("train", "--config", "nul.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".yaml"] == []


@pytest.mark.parametrize(
    "line",
    [
        ["train", "{bad}", "d.jsonl"],
        ["train", "{model}", "d.jsonl", "--proj_dir", "{bad}"],
        ["chat", "{bad}"],
        ["merge", "{model}", "a", "--output", "{bad}.pth"],
    ],
)
def test_a_name_that_is_not_in_utf8_is_refused_before_work_is_lost(
    line: list[str], model_file: Path, tmp_path: Path, cli: Callable[..., SimpleNamespace]
) -> None:
    # as a file from an archive of Windows has
    bad = os.fsdecode(os.fsencode(tmp_path) + "/模型".encode("gbk"))
    done = cli(*(word.format(bad=bad, model=model_file) for word in line))
    assert done.code == 2 and "this name is not in UTF-8, which those who read" in done.err
    # rows are read whatever their file is called
    data = f"{bad}.jsonl"
    try:
        Path(data).write_text('{"text": "a b"}\n')
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    assert cli("data", data).code == 0
