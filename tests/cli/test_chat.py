"""A dialogue at a terminal, and in a pipe."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights, write_weights
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import TEMPLATES
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import Stopped
from rwkv_peft.generation.chat import Chat
from rwkv_peft.generation.sampling import Sampling
from rwkv_peft.generation.thinking import split_thoughts
from rwkv_peft.printing import print_answer

Cli = Callable[..., SimpleNamespace]
# a process that takes the terminal at its stdin for its own, then becomes the program
TAKES_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'rwkv_peft.cli.main', *sys.argv[1:]])"
)


class Terminal:
    """A program at a pseudo-terminal."""

    def __init__(self, *args: object, cwd: Path) -> None:
        import pty

        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment["COLUMNS"] = "120"
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKES_TERMINAL, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self._seen = b""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What came up to the end of a pattern, without the codes that move the cursor."""
        end = time.monotonic() + seconds
        while True:
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._seen.decode("utf-8", "replace"))
            if found := re.search(pattern, text, re.S):
                self._seen = text[found.end() :].encode()
                return text[: found.end()]
            assert time.monotonic() < end and self.process.poll() is None, text[-2000:]
            self._seen += self._read()

    def _read(self) -> bytes:
        if select.select([self._master], [], [], 0.1)[0]:
            try:
                return os.read(self._master, 65536)
            except OSError:
                # nobody has the other end open any more
                time.sleep(0.05)
        return b""

    def end(self) -> int:
        """The exit code, once the program has ended."""
        while self.process.poll() is None:
            self._read()
        os.close(self._master)
        return self.process.returncode


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*args: object) -> Terminal:
        opened.append(Terminal(*args, cwd=tmp_path))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()


@pytest.fixture
def endless_model(model_file: Path, tmp_path: Path) -> Path:
    """A model whose answers have no line break and no end, so that they go on until stopped."""
    weights = dict(read_weights(model_file))
    tokenizer = Tokenizer(len(weights["head.weight"]))
    ends = [i for i in range(1, tokenizer.vocab_size) if b"\n" in (tokenizer.token_bytes(i) or b"")]
    # the hidden state has ones in it, of which these tokens have the opposite
    weights["ln_out.bias"] = torch.ones_like(weights["ln_out.bias"])
    weights["head.weight"] = weights["head.weight"].clone()
    weights["head.weight"][[0, *ends]] = -1
    write_weights(tmp_path / "endless.pth", weights)
    return tmp_path / "endless.pth"


@pytest.mark.skipif(sys.platform != "linux", reason="opens a pseudo-terminal of Linux")
def test_a_dialogue_at_a_terminal(
    open_terminal: Callable[..., Terminal], endless_model: Path, tmp_path: Path
) -> None:
    line = ("chat", endless_model, "--max_tokens", 100_000, "--accelerator", "cpu", "--top_p", 1)
    terminal = open_terminal(*line)
    banner = terminal.wait_for("User:")
    assert f"{endless_model}, template chat: /help lists commands, /exit leaves" in banner
    # an empty line does nothing, and is met with the next prompt
    terminal.type("\r")
    assert "Assistant" not in terminal.wait_for("User:")
    terminal.type("/help\r")
    shown = terminal.wait_for("/exit +leave.*?User:")
    assert all(word in shown for word in ("/reset", "/system TEXT", "/save FILE", "Ctrl-C"))
    terminal.type("first\r")
    terminal.wait_for("Assistant:.{20}")
    # the answer goes on for long: Ctrl-C ends it and nothing else
    terminal.type("\x03")
    terminal.wait_for(r" \(stopped\).*?User:")
    # a key that is held down, or a signal that comes late, ends nothing more
    terminal.type("again\r")
    terminal.wait_for("Assistant:.{10}")
    for _ in range(30):
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    terminal.wait_for(r" \(stopped\).*?User:")
    terminal.process.send_signal(signal.SIGINT)
    terminal.type("/reset\r")
    terminal.wait_for("begins anew.*?User:")
    terminal.type("first\r")
    terminal.wait_for("Assistant:.{10}")
    terminal.type("\x03")
    terminal.wait_for(r" \(stopped\).*?User:")
    # Ctrl-C at the prompt drops the line, and says how to leave
    terminal.type("dropped\x03")
    terminal.wait_for(r"\(/exit or Ctrl-D leaves\).*?User:")
    # the terminal's own history and editing: up, then the last letter is replaced
    terminal.type("\x1b[A\x7fT\r")
    terminal.wait_for("firsT.*?Assistant:.{10}")
    terminal.type("\x03")
    terminal.wait_for(r" \(stopped\).*?User:")
    terminal.type("/save talk.jsonl\r")
    terminal.wait_for("saved talk.jsonl.*?User:")
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [x["role"] for x in row["messages"]] == ["user", "assistant"] * 2
    assert [x["content"] for x in row["messages"]][::2] == ["first", "firsT"]
    assert all(x["content"] for x in row["messages"])
    terminal.type("/system be kind\r")
    terminal.wait_for("anew, with this system text.*?User:")
    terminal.type("/save talk.jsonl\r")
    terminal.wait_for("not saved: .*?User:")
    terminal.type("/reset\r")
    terminal.wait_for("begins anew.*?User:")
    terminal.type("/nothing\r")
    terminal.wait_for("there is no /nothing: /help lists.*?User:")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="opens a pseudo-terminal of Linux")
def test_a_dialogue_at_a_terminal_in_chinese(
    open_terminal: Callable[..., Terminal], endless_model: Path
) -> None:
    line = ("chat", endless_model, "--max_tokens", 100_000, "--accelerator", "cpu", "--lang", "zh")
    terminal = open_terminal(*line)
    assert "模板 chat：/help 列出命令，/exit 离开。Ctrl-C" in terminal.wait_for("User:")
    terminal.type("/help\r")
    terminal.wait_for("/reset +忘掉这段对话.*?/exit +离开，同 Ctrl-D.*?Ctrl-C 停止回答.*?User:")
    terminal.type("你好\r")
    terminal.wait_for("Assistant:.{10}")
    terminal.type("\x03")
    terminal.wait_for(r"（已停止）.*?User:")
    terminal.type("/save\r")
    terminal.wait_for("/save FILE 把它写入文件.*?User:")
    terminal.type("/system 说话简短\r")
    terminal.wait_for("对话重新开始，用这段系统提示.*?User:")
    terminal.type("/nothing\r")
    terminal.wait_for("没有 /nothing：/help 列出有哪些.*?User:")
    # an answer was stopped, and the program can still be
    terminal.process.terminate()
    assert terminal.end() == 128 + signal.SIGTERM


def test_lines_of_a_pipe_are_turns_and_commands(
    cli: Cli, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    (tmp_path / "tools.json").write_text('[{"name": "look", "parameters": {}}]')
    said = f"hi\n\n/system quiet\nthere\n/save {tmp_path / 'talk.jsonl'}\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    limits = ("--max_tokens", 3, "--system", "loud", "--tools", tmp_path / "tools.json")
    done = cli("chat", model_file, *limits)
    assert done.code == 0 and done.out.count("Assistant:") == 2, done.err
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [x["content"] for x in row["messages"]][:2] == ["quiet", "there"]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    wrong = cli("chat", model_file, "--tools", model_file)
    assert wrong.code == 2 and "holds no list of functions" in wrong.err


@pytest.fixture
def chat(model_file: Path) -> Chat:
    model = rwkv_peft.load_model(model_file)
    return Chat(model, Sampling(temperature=0), system="be kind")


def answer_anew(model_file: Path, turns: list[Turn]) -> str:
    template = TEMPLATES["chat"]
    prompt = template.prompt(turns)
    model = rwkv_peft.load_model(model_file)
    sampling = Sampling(temperature=0)
    return rwkv_peft.generate(
        model, prompt, max_tokens=6, sampling=sampling, stop=list(template.stops)
    )


def test_what_was_said_of_a_broken_answer_stays(chat: Chat, model_file: Path) -> None:
    pieces = chat.reply("one", 50)
    said = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns[1:] == [Turn("user", "one"), Turn("assistant", said)]
    assert chat.turns[0] == Turn("system", "be kind")
    turns = [*chat.turns, Turn("user", "two")]
    assert "".join(chat.reply("two", 6)) == answer_anew(model_file, turns)


def test_a_turn_that_was_broken_off_before_its_answer_is_none(
    chat: Chat, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "".join(chat.reply("one", 3))
    turns = chat.turns
    read = chat._session.read

    def read_a_part(tokens: list[int]) -> None:
        read(tokens[:2])
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(chat._session, "read", read_a_part)
    with pytest.raises(Stopped):
        "".join(chat.reply("a long text that is broken off", 3))
    monkeypatch.setattr(chat._session, "read", read)
    assert chat.turns == turns
    text = "".join(chat.reply("two", 6))
    assert text == answer_anew(model_file, [*turns, Turn("user", "two")])
    chat.reset()
    assert "".join(chat.reply("two", 6)) == answer_anew(model_file, [Turn("user", "two")])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_are_told_apart_however_the_text_is_cut(size: int) -> None:
    text = "a <think>b < c</thinker></think> d <thin> e<think>f"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = list(split_thoughts(pieces))
    assert "".join(part for part, _ in parts) == text
    said = "".join(part for part, is_thought in parts if not is_thought)
    assert said == "a  d <thin> e"


def test_a_thought_is_dim_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_answer("a\x1b", is_dim=True)
    assert capsys.readouterr().out == "a\x1b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_answer("a\x1b", is_dim=True)
    assert capsys.readouterr().out == "\x1b[2ma\\x1b\x1b[0m"
