"""What pyproject.toml allows is what the tests run with."""

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_the_one_minor_version_of_peft_that_is_tested_is_allowed() -> None:
    # another minor version may change the private parts that methods/factors.py uses
    found = re.search(r'"(peft[^"]*)"', (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"^peft==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found and tested
    allowed, version = Requirement(found[1]).specifier, Version(tested[1])
    assert version in allowed
    for minor in (version.minor - 1, version.minor + 1):
        assert f"{version.major}.{minor}.0" not in allowed
