"""Paths of the files that come with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent
# a small RWKV-7 in English, which BASE_MODEL.md describes
BASE_MODEL = _FOLDER / "base.pth"
# dialogues in the manner of the Devil's Dictionary, to train on and to judge by
DIALOGUES = _FOLDER / "dialogues.jsonl"
HELD_OUT_DIALOGUES = _FOLDER / "dialogues_heldout.jsonl"
# flags of other programs and what to say of them
FOREIGN_FLAGS = _FOLDER / "foreign_flags.txt"
# catalogues of messages in other languages
LOCALES = _FOLDER / "locale"
