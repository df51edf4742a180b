"""`rwkv-peft chat MODEL`"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_peft.cli.generate import ModelOptions, say_undecodable, without_last_breaks
from rwkv_peft.cli.given import complete
from rwkv_peft.cli.parse import parse
from rwkv_peft.errors import ConfigError, RwkvPeftError, Stopped
from rwkv_peft.language import translate
from rwkv_peft.printing import print_answer, print_line, print_text

if TYPE_CHECKING:
    from rwkv_peft.generation.chat import Chat

HELP = {
    "/help": "what can be typed here",
    "/reset": "forget the dialogue and begin anew",
    "/system TEXT": "begin anew with this before the first turn; without a text, with none",
    "/save FILE": "write the dialogue as a row to train on",
    "/exit": "leave, as Ctrl-D does",
}
KEYS = "Ctrl-C stops an answer; up and down bring earlier lines back"


@dataclass(frozen=True, slots=True)
class ChatOptions(ModelOptions):
    """A dialogue."""

    max_tokens: int = 1024
    """Most tokens of an answer."""
    system: str = ""
    """What stands before the first turn."""
    tools: str = ""
    """File of functions that the model may call, as JSON: a list of them, as in data."""


def run(args: Sequence[str]) -> int:
    """Reads turns and prints the answers until /exit or the end of the input."""
    options = parse(ChatOptions, args, command="chat", positional=("load_model",))
    options = complete(options, "chat")
    system = "\n\n".join(filter(None, [options.system, _read_tools(options.tools)]))
    model = options.model()

    from rwkv_peft.generation.chat import Chat

    template = options.run_template()
    chat = Chat(model, options.sampling(), template=template, seed=options.seed, system=system)
    is_person = sys.stdin.isatty() and sys.stdout.isatty()
    if is_person:
        named = options.adapter or options.state or options.load_model
        print_line(f"{named}, template {template.name}: /help lists commands, /exit leaves. {KEYS}")
    ears = Ears(is_person)
    for text in _lines(_prompt_toolkit() if is_person else input):
        if not text.startswith("/"):
            _answer(chat, text, options.max_tokens, ears)
        elif not _obey(chat, text, system):
            break
    return 0


class Ears:
    """Hears Ctrl-C while there is an answer to be stopped, and at no other time.

    A key that is pressed twice, or as an answer ends, would end the program otherwise.

    Args:
        is_person: whether someone types; else nothing is changed.
    """

    def __init__(self, is_person: bool) -> None:
        self._is_person = is_person
        self._handler = signal.getsignal(signal.SIGINT)
        self.close()

    def open(self) -> None:
        """Ctrl-C is heard from now on."""
        if self._is_person:
            signal.signal(signal.SIGINT, self._handler)

    def close(self) -> None:
        """It is not."""
        if self._is_person:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _lines(read: Callable[[str], str]) -> Iterator[str]:
    """The lines that hold something, each without the white space around it."""
    while True:
        try:
            text = read("User: ").strip()
        except EOFError:
            print_text("")
            return
        except KeyboardInterrupt as error:
            if isinstance(error, Stopped):
                raise
            # a key of the line's own editor, which has dropped the line
            print_line("(/exit or Ctrl-D leaves)")
            continue
        if problem := say_undecodable(text):
            print_line(f"note: {problem}; this line was not read", file=sys.stderr)
        elif text:
            yield text


def _prompt_toolkit() -> Callable[[str], str]:
    """Reads a line with its own editing and history; keys of the terminal work as elsewhere."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    words = [command.split()[0] for command in HELP]
    session: PromptSession[str] = PromptSession(
        completer=WordCompleter(words, sentence=True), complete_while_typing=False
    )
    # signals stay with the program: in the editor Ctrl-C is a key
    return lambda prompt: session.prompt(prompt, handle_sigint=False)


def _answer(chat: "Chat", text: str, max_tokens: int, ears: Ears) -> None:
    from rwkv_peft.generation.thinking import split_thoughts

    print_answer("\nAssistant:")
    pieces = chat.reply(text, max_tokens)
    try:
        try:
            ears.open()
            for part, is_thought in split_thoughts(without_last_breaks(pieces)):
                print_answer(part, is_dim=is_thought)
        finally:
            ears.close()
    except Stopped as stopped:
        ears.close()
        if stopped.signal != signal.SIGINT:
            raise
        print_answer(translate(" (stopped)"))
    print_answer("\n\n")


def _obey(chat: "Chat", text: str, system: str) -> bool:
    """Does what a line that begins with / asks for; False if that is the end."""
    command, _, rest = text.partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit", "/bye"):
        return False
    if command in ("/reset", "/clear", "/new"):
        chat.reset(chat.turns[0].text if chat.turns and chat.turns[0].role == "system" else "")
        print_line("the dialogue begins anew")
    elif command == "/system":
        chat.reset(rest)
        print_line(
            f"the dialogue begins anew, {'with this system text' if rest else 'without one'}"
        )
    elif command == "/save":
        _save(chat, rest)
    elif command in ("/help", "/?"):
        for name, what in HELP.items():
            print_line(f"  {name:<13} {translate(what)}")
        print_line(f"  {KEYS}")
    else:
        print_line(f"there is no {command}: /help lists what there is")
    return True


def _save(chat: "Chat", file: str) -> None:
    """Writes the dialogue as a row of messages; says what stands in the way."""
    from rwkv_peft.guard import require_free
    from rwkv_peft.writing import atomic_file

    path = file.strip("\"'")
    if not path or not chat.turns:
        print_line("/save FILE writes the dialogue, once there is one")
        return
    row = {"messages": [{"role": x.role, "content": x.text.strip()} for x in chat.turns]}
    try:
        require_free(path, flag="/save")
        with atomic_file(Path(path), "w") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    except (RwkvPeftError, OSError) as error:
        print_line(f"not saved: {error}")
        return
    print_line(f"saved {path}: a row to train on, or to go on from")


def _read_tools(path: str) -> str:
    """The system text of the functions in a file.

    Raises:
        ConfigError: it cannot be read or holds none.
    """
    if not path:
        return ""
    from rwkv_peft.data.tools import write_tools

    try:
        return write_tools(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"--tools {path} holds no list of functions: {said}") from error
