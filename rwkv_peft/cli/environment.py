"""What to type where a package is missing, most often since no environment is active."""

import os
import shlex
import sys
from pathlib import Path

# packages that the program cannot do without, by the names under which they are imported
NEEDED = ["torch", "numpy", "safetensors", "peft", "jinja2", "jsonargparse"]
NEEDED += ["yaml", "rich", "prompt_toolkit"]
ROOT = Path(__file__).parents[2]


def describe_missing(error: ModuleNotFoundError) -> str:
    """What to do about a package that is missing; "" if it is none that is needed."""
    name = (error.name or "").partition(".")[0]
    if name not in NEEDED:
        return ""
    what = f"{sys.executable} has no package {name}"
    if sys.prefix != sys.base_prefix:
        return f"{what}: type {_go_home()}pip install {_source()}"
    if activate := find_activation(ROOT):
        return f"{what}, as no environment is active: type {activate}"
    make = f"python3 -m venv .venv && .venv/bin/pip install {_source()} && . .venv/bin/activate"
    return f"{what}, as no environment is active: type {_go_home()}{make}"


def find_activation(root: Path) -> str:
    """The command that activates the environment .venv of a folder; "" if it has none."""
    place = "Scripts" if os.name == "nt" else "bin"
    activate = root / ".venv" / place / "activate"
    if not activate.is_file():
        return ""
    return str(activate) if os.name == "nt" else f". {shlex.quote(str(activate))}"


def _go_home() -> str:
    return f"cd {shlex.quote(str(ROOT))} && " if _is_clone() and Path.cwd() != ROOT else ""


def _source() -> str:
    """What pip installs: the clone, with the versions that were tested, or the package by name."""
    return "-c constraints.txt ." if _is_clone() else "rwkv-peft"


def _is_clone() -> bool:
    return (ROOT / "constraints.txt").is_file()
