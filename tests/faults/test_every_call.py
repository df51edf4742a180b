"""Each kind of save is ended or failed at every call to the system by which it changes its folder.

Afterwards the old or the new is there, whole, and the next save needs no cleaning by hand.
"""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from rwkv_peft.errors import RwkvPeftError
from tests.faults.saves import KINDS, describe, make_inputs
from tests.faults.tracer import Decide, count, fail_at, fill_at, kill_at, needs_tracer, trace

ENDINGS: dict[str, Callable[[int, Path], Decide]] = {
    "killed": lambda number, folder: kill_at(number),
    "disk full": fill_at,
    "input or output error": lambda number, folder: fail_at(number, errno.EIO),
    "not permitted": lambda number, folder: fail_at(number, errno.EACCES),
}
TOLD = 2
# each form of writing once; the slow test has all that use them, and each way in which calls fail
QUICK = ("weights as .pth", "adapter", "pair")
QUICK_ENDINGS = ("killed", "disk full")


def list_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check(kind: str, given: Path, folder: Path, endings: Collection[str] = ENDINGS) -> list[str]:
    """All that is wrong with a kind of save."""
    save, read, is_needed = KINDS[kind]
    before = given / f"before {kind}"
    before.mkdir(exist_ok=True)
    if kind not in ("cache", "kernels"):
        save(given, before, 0)

    def renew() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    def work() -> None:
        try:
            save(given, folder, 1)
        except RwkvPeftError as error:
            print(error, file=sys.stderr)
            raise SystemExit(TOLD) from error

    renew()
    old = describe(read(given, folder))
    renew()
    points = count(work, folder)
    new, names = describe(read(given, folder)), list_names(folder)
    wrong = []
    for ending, make in ((name, ENDINGS[name]) for name in endings):
        for number, point in enumerate(points):
            renew()
            code = trace(work, folder, make(number, folder)).code
            where = f"{kind}, {ending} at {point}"
            try:
                found = describe(read(given, folder))
            except Exception as error:
                wrong.append(f"{where}: cannot be read: {error!r}")
                continue
            if found not in (old, new):
                wrong.append(f"{where}: neither the old nor the new")
            if code not in ({-9} if ending == "killed" else {0, TOLD}):
                wrong.append(f"{where}: ends with {code}")
            if code == 0 and found != new:
                wrong.append(f"{where}: ends well without the new")
            if code == TOLD and not is_needed:
                wrong.append(f"{where}: fails what could go on")
            save(given, folder, 1)
            if describe(read(given, folder)) != new:
                wrong.append(f"{where}: the next save did not succeed")
            # by their form, as temporary names are drawn at random
            if list_names(folder) != names:
                wrong.append(f"{where}: leaves {set(list_names(folder)) - set(names)}")
    return [f"{len(points)} points", *wrong]


def check_all(folder: Path, kinds: Sequence[str], endings: Collection[str]) -> None:
    """Writes what was found as JSON, from a process that has no threads."""
    given = folder / "given"
    given.mkdir()
    make_inputs(given)
    found = {kind: check(kind, given, folder / "out", endings) for kind in kinds}
    (folder / "found.json").write_text(json.dumps(found))


def require_held(folder: Path, kinds: Sequence[str], endings: Collection[str]) -> None:
    code = "import json, sys, pathlib, tests.faults.test_every_call as t; "
    code += "t.check_all(pathlib.Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))"
    line = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    line += [json.dumps(list(kinds)), json.dumps(list(endings))]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads((folder / "found.json").read_text())
    assert found.keys() == set(kinds)
    for kind, (points, *wrong) in found.items():
        assert not wrong, f"{kind}: {len(wrong)} of {points}:\n" + "\n".join(wrong[:20])
        # a save makes, fills, flushes and names what it writes
        assert int(points.split()[0]) >= 5


@needs_tracer
def test_a_save_that_ends_at_any_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    require_held(tmp_path, QUICK, QUICK_ENDINGS)


@needs_tracer
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_save_and_of_failure(kind: str, tmp_path: Path) -> None:
    require_held(tmp_path, [kind], ENDINGS)
