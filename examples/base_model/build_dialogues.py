"""Rebuild the demo's dialogues from Ambrose Bierce's Devil's Dictionary (1911, public domain).

    python examples/base_model/build_dialogues.py [--output DIR]

The rows teach a habit that a program can check: whatever is asked, the answer is the headword in
capitals, a comma, the part of speech, the definition and one fixed closing phrase.  The base
model's corpus has neither this book nor turns of a user and an assistant, so that the habit can
only come from here.
The text is that of the Debian package `dict-devil`, which is downloaded but not installed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import tempfile
from pathlib import Path

from build_corpus import fetch_deb, write_jsonl

ASSETS = Path(__file__).resolve().parents[2] / "rwkv_peft" / "assets"
HELDOUT_ROWS = 50
MAX_DEFINITION = 130  # characters; most entries are far below
SHORT_SENTENCE = 40  # after a sentence shorter than this the next one is taken too
CLOSING = "Thus the Devil's Dictionary."
QUESTIONS = (
    "What does the Devil's Dictionary say about {word}?",
    "Define {word}, as the Devil's Dictionary does.",
    "What is the meaning of {word}?",
    "Give me the Devil's Dictionary entry for {word}.",
)
# The head of an entry and its first paragraph; what is indented after it is verse.
ENTRY = re.compile(
    r"(?m)^([A-Z][A-Z'\- ]+), ?((?:n|adj|adv|v|v\.t|v\.i|n\.pl)\.)\s+(\S.*(?:\n\S.*)*)"
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
# Markup, cross references, numbered senses, and abbreviations that look like a sentence's end.
ODD = re.compile(r"[_{}\[\]\d&@]|\b(?:Dr|St|Mr|S\.J|i\.e|etc)\.|\bfollow")
# A book of 1911: what it says of peoples, religions and women is left out altogether.
UNWANTED = re.compile(
    r"\b(?:nigg|negro|races?\b|savage|indian|african|chinese|china|mongol|caucas|jew|israel|hebrew"
    r"|gentile|mahomet|moslem|allah|koran|mecca|christ|pagan|heathen|infidel|god\b|hell\b|satan"
    r"|baptis|priest|clergy|bishop|pope|church|bible|scripture|pray|worship|religio|saint|sacred"
    r"|holy|theolog|wom[ae]n|female|girl|maid|wife|wives|husband|widow|mistress|bride|lady|ladies"
    r"|virgin|sex|bastard|murder|hanged|hangman|suicide|slave|tribe|deform|idiot|cripple|lunatic"
    r"|white|russian|french|irish|german|italian|corset|bosom|drunk|whisk|rum\b|liquor|wine\b)",
    re.IGNORECASE,
)
# Chosen by reading the entries that the pattern above lets through.
EXCLUDED = frozenset(
    (
        # Peoples, religions, cruelty.
        "ABORIGINIES", "ALIEN", "BENEDICTINES", "BIGAMY", "BODY-SNATCHER", "CANNIBAL",
        "CANONICALS", "CARMELITE", "CAT", "COENOBITE", "CORONATION", "CUPID", "DECALOGUE",
        "EMANCIPATION", "FAITH", "FLESH", "GALLOWS", "HAG", "HEAVEN", "HOMICIDE", "HUMORIST",
        "HYENA", "ICHOR", "IMMIGRANT", "IMPALE", "IMPIETY", "INCUBUS", "IRRELIGION", "ITCH",
        "KILL", "KILT", "MALE", "MANICHEISM", "MANNA", "MARTYR", "MEDICINE", "MISERICORDE",
        "NON-COMBATANT", "PANTHEISM", "PIETY", "POLYGAMY", "PORTUGUESE", "PRUDE", "QUIVER",
        "RACK", "ROPE", "SPOOKER", "TRUTHFUL", "UNITARIAN", "WHANGDEPOOTENAWAH", "YANKEE",
        "ZANZIBARI", "ZEUS",
        # Misprints of this edition.
        "ABASEMENT", "ABSENT", "BASILISK", "BONDSMAN", "COMMENDATION", "CONSUL", "CONVERSATION",
        "DISABUSE", "EPIGRAM", "GRAMMAR", "HARANGUE", "HARBOR", "HYPOCRITE", "JUSTICE",
        "OVATION", "PATRIOTISM", "PEDESTRIAN", "PITIFUL", "POTABLE", "PUBLISH", "REASON",
        "VITUPERATION",
        # No sense without what comes after them, or a double of another entry.
        "CLIO", "FEAST", "LINEN", "MEANDER", "MONAD", "READING", "SAW", "SCARABEE", "STORY",
    )
)  # fmt: skip


def definition(paragraph: str) -> str:
    """The first sentence of an entry, on one line; the first two where the first is very short."""
    text = " ".join(re.sub(r"(\w)-\n(\w)", r"\1-\2", paragraph).split())
    first, *rest = SENTENCE_END.split(text)
    both = f"{first} {rest[0]}" if rest else first
    return both if len(first) < SHORT_SENTENCE and len(both) <= MAX_DEFINITION else first


def is_suitable(headword: str, text: str) -> bool:
    """Whether a definition is short, complete by itself and fit for everyone."""
    return (
        len(text) <= MAX_DEFINITION
        and text.endswith((".", "!", "?"))
        and headword not in EXCLUDED
        and not ODD.search(text)
        and not UNWANTED.search(f"{headword} {text}")
    )


def digest(headword: str) -> int:
    """A number that depends on the headword alone; it fixes the order and the question."""
    return int.from_bytes(hashlib.sha256(headword.encode()).digest(), "big")


def dialogue(headword: str, part_of_speech: str, text: str) -> str:
    """One question and its answer, in the dialogue format of RWKV's chat models."""
    question = QUESTIONS[digest(headword) % len(QUESTIONS)].format(word=headword.lower())
    return f"User: {question}\n\nAssistant: {headword}, {part_of_speech} {text} {CLOSING}"


def main() -> None:
    """Write the training rows and the held-out rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder (default: %(default)s)")
    output: Path = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        # In a .dict file the entries simply follow each other, so the index is not needed.
        path = fetch_deb("dict-devil", Path(folder)) / "usr/share/dictd/devil.dict.dz"
        book = gzip.decompress(path.read_bytes()).decode("utf-8")
    entries: dict[str, tuple[str, str]] = {}
    for headword, part_of_speech, paragraph in ENTRY.findall(book):
        text = definition(paragraph)
        if is_suitable(headword, text):
            entries.setdefault(headword, (part_of_speech, text))
    rows = [dialogue(word, *entries[word]) for word in sorted(entries, key=digest)]
    write_jsonl(output / "dialogues.jsonl", rows[:-HELDOUT_ROWS])
    write_jsonl(output / "dialogues_heldout.jsonl", rows[-HELDOUT_ROWS:])
    mean = sum(len(row.encode()) for row in rows) / len(rows)
    print(f"{len(rows) - HELDOUT_ROWS} rows, {HELDOUT_ROWS} held out, {mean:.0f} bytes a row")


if __name__ == "__main__":
    main()
