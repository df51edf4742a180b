"""The messages of the program, as a catalogue has them.

`python tests/messages.py` prints those that the Chinese catalogue lacks, to be filled in there;
`msgfmt rwkv_peft.po -o rwkv_peft.mo` in its folder then makes the file that is read.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from inspect import getdoc
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rwkv_peft"
CATALOGUE = PACKAGE / "assets" / "locale" / "zh" / "LC_MESSAGES" / "rwkv_peft.po"
HOLE = re.compile(r"\{[#=+]?\d+\}")
# regular expressions, commands, templates, signatures, rows of data
CODE = re.compile(
    r"\(\?:|\\S|\(\.\+\)|&&|^rwkv-peft |\{%|\{\{|Tensor|^Iterator|^Sequence|\| None$|^\{\"|^\[\""
)
# whose texts are for programmers, or stand in files of other programs
FILES_OF_OTHERS = ("__init__.py", "exports/texts.py", "ops/validation.py", "methods/limits.py")
# prompts, names, arguments of other libraries, and words that are counted
NOT_SAID = {
    "  --config FILE",
    "/save FILE",
    "/system TEXT",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.",
    "C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA",
    "Return only a JSON function call.",
    "User: Function output:\n",
    "User: Why does the moon keep one face to the earth?\n\nAssistant: Over ages the tides slowed "
    "its turning, until one turn took as long as one round of its orbit.",
    "User: You are a very talented expert{0}. Answer this question:",
    "YAML file of the keys below.",
    "_[number of iters]",
    "cut safetensors",
    "cut zip",
    "data prepare",
    "llama.cpp, Ollama, LM Studio, koboldcpp",
    "not dim",
    "not dim green",
    "old torch",
    "optimizer step",
    "the state is of {0} (layers, rows), the model and tokens of {1}",
    "tokens must be (B, T) with T >= 1, got {0}",
    "toolkit of torch",
    "trial step",
    "wkv6: u must be {0}, got {1}",
    "{0}\n\nAssistant: The answer is",
}


def read_texts(path: Path) -> Iterator[str]:
    """Every text in the code of a file, with {0} or {#0} for what changes; no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = [x.value for x in ast.walk(tree) if isinstance(x, ast.Expr)]
    yield from _texts_of(tree, {id(x) for x in docs if isinstance(x, ast.Constant)})


def _texts_of(node: ast.AST, docs: set[int]) -> Iterator[str]:
    if id(node) in docs:
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "counted":
        yield from _texts_counted(node)
    parts = _parts(node)
    if any(isinstance(part, str) for part in parts):
        joined, inner = "", []
        for part in parts:
            joined += part if isinstance(part, str) else _hole(part, len(inner))
            inner += [] if isinstance(part, str) else [part]
        yield joined
    else:
        inner = list(ast.iter_child_nodes(node))
    for child in inner:
        yield from _texts_of(child, docs)


def _parts(node: ast.AST) -> list[str | ast.AST]:
    """What a text is made of: its words, and expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values for part in _parts(value)]
    if isinstance(node, ast.FormattedValue):
        return [node]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left) + _parts(node.right)
    return [node]


def _hole(node: ast.AST, number: int) -> str:
    """A place for what changes, of a number if it is formatted as one."""
    form = getattr(node, "format_spec", None)
    return f"{{{'#' * bool(form and re.search('[,defg%]', ast.unparse(form)[2:-1]))}{number}}}"


def _texts_counted(call: ast.Call) -> Iterator[str]:
    """A number and what it counts, one and several."""
    words = [x.value for x in call.args[1:] if isinstance(x, ast.Constant)]
    for noun in (words[0], words[1] if words[1:] else f"{words[0]}s"):
        yield f"{{#0}} {noun}"


def is_said(text: str) -> bool:
    """Whether a text in the code looks like one for a person: of two words and more."""
    is_code = CODE.search(text) or text in NOT_SAID
    words = re.search(r"[a-z]{2,}\W* (?:.*\W)?[A-Za-z]{2,}", HOLE.sub("0", text))
    begins = re.match(r"[a-z]+: \{#?0\}|\{#0\} [a-z-]+$", text)
    return not is_code and bool(words or begins)


def read_messages() -> Iterator[tuple[str, str]]:
    """Each text for a person in the program, with the file that has it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in FILES_OF_OTHERS:
            yield from ((text, name) for text in read_texts(path) if is_said(text))
    yield from ((text, "help") for text in read_flags())
    yield from ((text, "foreign_flags.txt") for text in read_answers())


def read_flags() -> Iterator[str]:
    """What the help of each command says of it and of its flags."""
    sys.path.insert(0, str(ROOT))
    from rwkv_peft.cli.help import field_texts
    from rwkv_peft.cli.main import COMMANDS

    for command in (*COMMANDS, "prepare"):
        options = getattr(import_module(f"rwkv_peft.cli.{command}"), f"{command.title()}Options")
        yield getdoc(options) or ""
        names = {field.name for field in fields(options)}
        texts = field_texts(options)
        yield from (" ".join(texts[name].split()) for name in texts if name in names)


def read_answers() -> Iterator[str]:
    """What is said of flags of other programs."""
    sys.path.insert(0, str(ROOT))
    from rwkv_peft.cli.foreign import read_table

    yield from dict.fromkeys(answer for _, answers in read_table() for answer in answers)


def read_catalogue() -> dict[str, str]:
    """The messages of the Chinese catalogue."""
    text = CATALOGUE.read_text(encoding="utf-8")
    pairs = re.findall(r'^msgid "(.+)"\nmsgstr "(.*)"$', text, re.M)
    return {unquote(a): unquote(b) for a, b in pairs}


def unquote(text: str) -> str:
    """A text of a catalogue without its escapes."""
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), text)


def quote(text: str) -> str:
    """A text as a catalogue writes it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def main() -> None:
    """Prints what the catalogue lacks."""
    known = read_catalogue()
    for text, name in dict(read_messages()).items():
        if text not in known:
            print(f'# {name}\nmsgid "{quote(text)}"\nmsgstr ""\n')


if __name__ == "__main__":
    main()
