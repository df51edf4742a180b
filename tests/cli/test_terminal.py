"""Terminals and pipes of every kind: encodings, closed pipes, and text that would act on them."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_peft.cli import main as main_module
from rwkv_peft.cli.main import COMMANDS, main
from rwkv_peft.printing import escape, print_answer, print_json

Cli = Callable[..., SimpleNamespace]
ENCODINGS = ["gbk", "cp1252", "ascii", "latin-1", "utf-8"]
# what no encoding has, what few have, and what acts on a terminal
ODD = "a字é«😀\x1b[31m\x07\r\x9b2J\u202e\u2066"
ROOT = Path(__file__).parents[2]


class Terminal(io.TextIOWrapper):
    """Stdout or stderr of an encoding, strict as Python's is."""

    def __init__(self, encoding: str, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Runs a command line with streams of an encoding."""

    def run(
        *args: object, encoding: str = "utf-8", is_terminal: bool = False, stdin: bytes = b""
    ) -> SimpleNamespace:
        out, err = Terminal(encoding, is_terminal), Terminal(encoding, is_terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding))
        try:
            code = main([str(a) for a in args])
        except SystemExit as end:
            code = int(end.code or 0)
        return SimpleNamespace(code=code, out=out.text, err=err.text)

    return run


@pytest.fixture
def odd_data(tmp_path: Path) -> Path:
    path = tmp_path / f"{ODD.replace(chr(13), '')}.jsonl"
    turns = [{"role": "user", "content": ODD}, {"role": "assistant", "content": ODD}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    return path


def acts_on_a_terminal(text: str) -> list[str]:
    return re.findall("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_data_shows_suits_every_encoding_and_acts_on_nothing(
    encoding: str, on_terminal: Callable[..., SimpleNamespace], odd_data: Path
) -> None:
    done = on_terminal("data", odd_data, encoding=encoding)
    assert done.code == 0, done.err
    assert not acts_on_a_terminal(done.out)
    assert r"\x1b[31m\x07\r\x9b2J\u202e\u2066" in done.out
    found = on_terminal("data", odd_data, "--json", encoding=encoding)
    assert not acts_on_a_terminal(found.out)
    facts = json.loads(found.out)
    assert facts["files"] == [str(odd_data)]
    assert ODD.strip() in facts["rows"][0]["text"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "args",
    [
        ("data", "{bad}"),
        ("data", "no" + ODD),
        ("inspect", "no" + ODD),
        ("train", "no" + ODD, "{bad}"),
        (f"tra{ODD}",),
        ("train", f"--{ODD}"),
        ("train", "--lr_init", ODD),
        ("data", "x", "--template", ODD),
    ],
)
def test_an_error_is_one_line_of_what_a_terminal_can_show(
    args: tuple[str, ...],
    encoding: str,
    on_terminal: Callable[..., SimpleNamespace],
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad\x1b[2J\nx.jsonl"
    bad.write_text(json.dumps({"messages": [{"role": ODD + "\nerror: x", "content": "a"}]}))
    done = on_terminal(*(a.format(bad=bad) if a == "{bad}" else a for a in args), encoding=encoding)
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert not acts_on_a_terminal(done.err)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_can_be_read_in_ascii(
    command: str, on_terminal: Callable[..., SimpleNamespace]
) -> None:
    done = on_terminal(*filter(None, [command]), "--help", encoding="ascii")
    assert done.code == 0 and "rwkv-peft" in done.out, done.err


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers with odd text and a table, without a model's file."""
    import rwkv_peft.api
    import rwkv_peft.generation.chat
    import rwkv_peft.generation.engine

    class Chat:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def reply(self, text: str, max_tokens: int) -> list[str]:
            return [f" {text}:", ODD, "\n\tb"]

    monkeypatch.setattr(rwkv_peft.api, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(rwkv_peft.generation.chat, "Chat", Chat)
    monkeypatch.setattr(
        rwkv_peft.generation.engine, "stream", lambda model, prompt, **_: [ODD, "\n\tb"]
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.usefixtures("answers")
def test_an_answer_is_whole_in_a_pipe_and_escaped_on_a_terminal(
    encoding: str, on_terminal: Callable[..., SimpleNamespace]
) -> None:
    args = ("generate", "--load_model", "m", "--prompt", "-")
    shown = on_terminal(*args, encoding=encoding, is_terminal=True, stdin=b"x")
    assert shown.code == 0 and not acts_on_a_terminal(shown.out)
    assert shown.out.endswith("\n\tb\n")
    piped = on_terminal(*args, encoding=encoding, stdin=b"x")
    assert piped.out == (ODD + "\n\tb\n").encode(encoding, "backslashreplace").decode(encoding)
    found = on_terminal(*args, "--json", encoding=encoding, is_terminal=True, stdin=b"x")
    assert json.loads(found.out)["text"] == ODD + "\n\tb"
    assert not acts_on_a_terminal(found.out)
    talk = on_terminal("chat", "m", encoding=encoding, is_terminal=True, stdin=b"hi\n\n")
    assert talk.code == 0 and "hi:" in talk.out and not acts_on_a_terminal(talk.out)


@pytest.mark.usefixtures("answers")
def test_input_that_is_not_in_its_encoding_is_told(
    on_terminal: Callable[..., SimpleNamespace],
) -> None:
    done = on_terminal("generate", "--load_model", "m", "--prompt", "-", stdin=b"a\xff")
    assert done.code == 2 and done.err.startswith("error: standard input is not text in utf-8: set")
    talk = on_terminal("chat", "m", stdin="好\n".encode("gbk") + b"two\n\n")
    assert talk.code == 0 and talk.out.count("Assistant:") == 1 and "two:" in talk.out
    assert talk.err.count("\n") == 1 and "this line was not read" in talk.err
    talk = on_terminal("chat", "m", stdin="好\n".encode("gbk"), encoding="gbk")
    assert "好:" in talk.out


@pytest.mark.parametrize(
    ("variables", "has_colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_what_is_trained_is_marked_where_there_is_no_colour(
    variables: dict[str, str],
    has_colour: bool,
    on_terminal: Callable[..., SimpleNamespace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "who?", "completion": "me"}\n')
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    shown = on_terminal("data", path, is_terminal=True).out
    assert ("«me" in shown) != has_colour and ("\x1b[32mme" in shown) == has_colour


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
def test_a_thought_has_no_escapes_where_they_are_not_wanted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal("utf-8", True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv(name, "dumb")
    print_answer("<think>hm</think>", is_dim=True)
    assert stream.text == "<think>hm</think>"


def test_escapes_name_the_character_and_leave_the_rest() -> None:
    text = "字\t\n\x1b\x7f\x85\u202e\ud800e\u0301\u200d"
    assert escape(text) == "字\\t\\n\\x1b\\x7f\\x85\\u202e\\ud800e\u0301\u200d"
    assert escape(text, keeps="\n\t").startswith("字\t\n\\x1b")


def test_json_gives_back_every_character(capsys: pytest.CaptureFixture[str]) -> None:
    value = "".join(map(chr, range(0x500))) + ODD + "\u2028\ud800"
    print_json({value: value})
    assert json.loads(capsys.readouterr().out) == {value: value}


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
@pytest.mark.parametrize("stream", ["gone", "full"])
def test_output_that_cannot_be_written_leaves_no_trace(args: list[str], stream: str) -> None:
    if stream == "full":
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "rwkv_peft.cli.main", *args]
    done = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(target)
    expected = (141, "") if stream == "gone" else (2, "error: No space left on device\n")
    assert (done.returncode, done.stderr) == expected


def test_a_command_whose_reader_goes_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    def run(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(main_module, "run", run)
    done = cli("data", "x")
    assert (done.code, done.out, done.err) == (141, "", "")


def test_everything_is_printed_by_one_module() -> None:
    package = Path(main_module.__file__).parents[1]
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "printing.py"
        and re.search(r"(?<![\w.])print\(|std(out|err)\.write\(", path.read_text(encoding="utf-8"))
    ]
    assert not found, "use print_line, print_text, print_answer or print_json"


def options_of(command: str) -> list[type[Any]]:
    """The option classes that a command's module defines or takes from config."""
    module = import_module(f"rwkv_peft.cli.{command}")
    names = [n for n in vars(module) if n.endswith(("Options", "TrainConfig"))]
    return [getattr(module, name) for name in names if name.lower().startswith(command)]


BOOLS = [
    (command, options, field.name)
    for command in [*COMMANDS, "prepare"]
    for options in options_of(command)
    for field in fields(options)
    if field.type in (bool, "bool")
]


@pytest.mark.parametrize(("command", "options", "name"), BOOLS)
def test_a_switch_takes_no_value_or_true_or_false_in_any_case(
    command: str, options: type[Any], name: str
) -> None:
    from rwkv_peft.cli.parse import parse

    for words, expected in (
        ([f"--{name}"], True),
        ([f"--{name}", "--config"], True),
        ([f"--{name}", "true"], True),
        ([f"--{name}=True"], True),
        ([f"--{name}", "False"], False),
        ([f"--{name}=false"], False),
        ([], False),
    ):
        given = parse(options, [w for w in words if w != "--config"], command=command)
        assert getattr(given, name) is expected, words


@pytest.mark.usefixtures("answers")
def test_help_names_the_keys_of_the_json_that_is_printed(
    cli: Cli, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(command: str) -> list[str]:
        with pytest.raises(SystemExit):
            cli(command, "--help")
        text = " ".join(capsys.readouterr().out.split())
        about = re.search(r"Print one JSON object[:;](?: its `rows` hold)? ([\w, ]+)", text)
        assert about
        return re.findall(r"\w+", about[1].partition(", a boolean")[0].replace(" and ", ", "))

    answer = json.loads(cli("generate", "--load_model", "m", "--prompt", "a", "--json").out)
    assert named("generate") == list(answer)
    facts = json.loads(cli("data", data_file, "--json").out)
    assert named("data") == list(facts["rows"][0])
