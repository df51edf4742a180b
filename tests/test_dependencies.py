"""What pyproject.toml allows is what the tests run with."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_uv_has_the_constraints_of_pip() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"constraint-dependencies = \[\n(.*?)\n\]", text, re.DOTALL)
    assert found
    assert [x.strip().rstrip(",")[1:-1] for x in found[1].splitlines()] == wanted
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_plain_pip_install_takes_no_newer_minor_version_than_was_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"\ndependencies = \[\n(.*?)\n\]", text, re.DOTALL)
    assert found
    tested: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pinned = Requirement(line)
            (specifier,) = pinned.specifier
            name = pinned.name.lower().replace("_", "-")
            tested.setdefault(name, []).append(Version(specifier.version))
    for asked in re.findall(r'"([^"]+)"', found[1]):
        requirement = Requirement(asked)
        versions = tested[requirement.name.lower()]
        newest = max(versions)
        assert all(version in requirement.specifier for version in versions), asked
        assert f"{newest.major}.{newest.minor + 1}.0" not in requirement.specifier, asked


def test_the_one_minor_version_of_peft_that_is_tested_is_allowed() -> None:
    # another minor version may change the private parts that methods/factors.py uses
    found = re.search(r'"(peft[^"]*)"', (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"^peft==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found and tested
    allowed, version = Requirement(found[1]).specifier, Version(tested[1])
    assert version in allowed
    for minor in (version.minor - 1, version.minor + 1):
        assert f"{version.major}.{minor}.0" not in allowed


@pytest.mark.slow
def test_uv_sync_takes_the_versions_that_were_tested(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    outside = {x: y for x, y in os.environ.items() if x not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([uv, "sync", "-q"], check=True, cwd=clone, env=outside)
    python = clone / ".venv" / "bin" / "python"
    asked = [uv, "pip", "freeze", "-q", "--python", str(python)]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    found = dict(re.findall(r"^([\w.-]+)==([^+\n]+)", "\n".join(lines), re.MULTILINE))
    assert {"torch", "peft", "numpy"} <= set(found)
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pinned = Requirement(line) if line and not line.startswith("#") else None
        name = pinned.name.lower().replace("_", "-") if pinned else ""
        if pinned and name in found and (pinned.marker is None or pinned.marker.evaluate()):
            assert Version(found[name]) in pinned.specifier, line
    done = subprocess.run([python, "-m", "rwkv_peft.cli.main", "--version"], env=outside, cwd=clone)
    assert done.returncode == 0
