"""Files and folders are the old or the new at every moment, whatever fails in between."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft import writing
from rwkv_peft.errors import CheckpointError
from rwkv_peft.writing import atomic_file, atomic_folder, cache_folder, restore_folder

# what a write does to the disk, as the names that are replaced to fail or to kill
NAMES = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
CALLS = {"builtins.open": open, **{f"os.{name}": getattr(os, name) for name in NAMES}}
# as many calls as no write makes
MANY = 60


def write_file(path: Path, content: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(content)


def write_folder(path: Path, content: str) -> None:
    with atomic_folder(path) as new:
        (new / "one").write_text(content)
        (new / "inner").mkdir()
        (new / "inner" / "two").write_text(content)


def content_of(path: Path) -> list[str]:
    """The content of each file, without that of other names."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [file.read_text() for file in files]


WRITERS: dict[str, tuple[Callable[[Path, str], None], int]] = {
    "file": (write_file, 1),
    "folder": (write_folder, 2),
    "folder by two renames": (write_folder, 2),
}


@contextmanager
def interrupted(at: int, action: Callable[[], None]) -> Iterator[list[str]]:
    """Runs `action` before the call number `at` to the system; gives the calls made."""
    made: list[str] = []
    removing: list[Path] = []
    remove = writing._remove

    def replaced(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            made.append("remove: " * bool(removing) + name)
            if len(made) == at + 1:
                action()
            return call(*args, **options)

        return run

    def remove_and_tell(path: Path) -> None:
        removing.append(path)
        remove(path)
        removing.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_remove", remove_and_tell)
        for name, call in CALLS.items():
            patch.setattr(name, replaced(name, call))
        patch.setattr(writing, "_swap", replaced("swap", writing._swap))
        yield made


def set_up(kind: str, patch: pytest.MonkeyPatch) -> tuple[Callable[[Path, str], None], int]:
    """The writer of a kind, and how many files it writes."""
    if kind == "folder by two renames":
        patch.setattr(writing, "_swap", lambda one, other: False)
    elif kind == "folder" and sys.platform not in ("linux", "darwin"):
        pytest.skip("this system swaps no names")
    return WRITERS[kind]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_call_that_fails_leaves_the_old_or_the_new_and_no_temporary(
    kind: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, count = set_up(kind, monkeypatch)
    path = tmp_path / "target"

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for at in range(MANY):
        write(path, "old")
        message = ""
        with interrupted(at, fail) as made:
            try:
                write(path, "new")
            except CheckpointError as error:
                message = str(error)
        found = content_of(path)
        assert found in (["old"] * count, ["new"] * count), made
        if message:
            assert message.startswith(f"cannot write {path}: {os.strerror(number)}")
            assert ("is untouched" in message) <= (found == ["old"] * count), made
        else:
            assert found == ["new"] * count, made
        # what could not be removed is removed by the next writer
        if len(made) <= at or not made[at].startswith("remove: "):
            assert os.listdir(tmp_path) == ["target"], made
        if len(made) <= at:
            return
    pytest.fail(f"a write makes {MANY} calls or more")


def run_in_processes(*lines: str) -> None:
    """Runs each line in a process of its own, all at once."""
    code = "from tests.test_writing import *\npatch = pytest.MonkeyPatch()\n"
    running = [subprocess.Popen([sys.executable, "-c", code + line]) for line in lines]
    assert [process.wait() for process in running] == [0] * len(lines)


def kill_at_every_call(kind: str, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Writes in children that are killed, each at another call, and looks at what they leave."""
    write, count = set_up(kind, patch)
    write(path, "old")
    for at in range(MANY):
        if (child := os.fork()) == 0:
            with interrupted(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                write(path, "new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert path.exists() or kind == "folder by two renames", at
        # what a reader does first
        restore_folder(path)
        assert content_of(path) in (["old"] * count, ["new"] * count), at
        write(path, "old")
        assert content_of(path) == ["old"] * count
        assert os.listdir(path.parent) == [path.name], at
        if status == 0:
            return
    raise AssertionError(f"a write makes {MANY} calls or more")


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_writer_killed_at_any_call_leaves_the_old_or_the_new_and_is_cleaned_after(
    kind: str, tmp_path: Path
) -> None:
    # in a process of its own, as this one may have threads, which a fork does not take along
    run_in_processes(f"kill_at_every_call({kind!r}, Path({str(tmp_path / 't')!r}), patch)")


def test_an_error_of_the_caller_passes_and_leaves_the_old(tmp_path: Path) -> None:
    for name in ("file", "folder"):
        (write, count), path = WRITERS[name], tmp_path / name
        write(path, "old")
        opened: Any = atomic_file(path, "w") if name == "file" else atomic_folder(path)
        with pytest.raises(KeyboardInterrupt), opened:
            raise KeyboardInterrupt
        assert content_of(path) == ["old"] * count
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("kind", ["folder", "folder by two renames"])
def test_a_folder_takes_the_place_of_anything(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_up(kind, monkeypatch)
    for name in ("file", "link", "empty", "full", "inner/none"):
        path = tmp_path / name
        if name == "file":
            path.write_text("a file")
        elif name == "link":
            path.symlink_to(tmp_path / "file")
        elif name in ("empty", "full"):
            path.mkdir()
        if name == "full":
            (path / "foreign").write_text("of the user")
        write_folder(path, "new")
        assert content_of(path) == ["new"] * 2
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "inner", "link"]


@pytest.mark.parametrize("kind", ["folder", "folder by two renames"])
def test_leftovers_of_older_versions_and_of_other_machines_do_not_block(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_up(kind, monkeypatch)
    others = [".target.new", ".target.old", f".target.{'0' * 16}.tmp", ".target.part"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("left")
    write_folder(tmp_path / "target", "new")
    write_folder(tmp_path / "target", "newer")
    assert content_of(tmp_path / "target") == ["newer"] * 2
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "target"])


def test_the_temporary_of_a_living_writer_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "target") as new, atomic_file(tmp_path / "other") as file:
        write_folder(tmp_path / "target", "first")
        write_file(tmp_path / "other", "first")
        (new / "file").write_text("second")
        file.write(b"second")
    assert content_of(tmp_path) == ["second"] * 2


@pytest.mark.parametrize("kind", ["folder", "folder by two renames"])
def test_the_first_folder_stays_where_that_is_asked(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_up(kind, monkeypatch)
    with atomic_folder(tmp_path / "target", keeps_first=True) as new:
        write_folder(tmp_path / "target", "first")
        (new / "file").write_text("second")
    assert content_of(tmp_path / "target") == ["first"] * 2
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_of_one_target_at_once_leave_one_of_theirs(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write = f"write, _ = set_up({kind!r}, patch)\nfor _ in range(50): write(Path({str(target)!r}), "
    run_in_processes(*(f"{write}{name!r})" for name in "abc"))
    found = content_of(target)
    assert found == [found[0]] * WRITERS[kind][1] and found[0] in "abc"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize(
    ("platform", "variable", "usual"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", "XDG_CACHE_HOME", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ],
)
def test_caches_lie_where_the_system_keeps_them(
    platform: str, variable: str, usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, "/somewhere")
    assert cache_folder("kernels") == Path("/somewhere/rwkv-peft/kernels")
    monkeypatch.delenv(variable)
    assert cache_folder() == Path.home() / usual / "rwkv-peft"
