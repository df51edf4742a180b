"""`rwkv-peft chat MODEL`"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from rwkv_peft.cli.generate import ModelOptions, say_undecodable
from rwkv_peft.cli.given import complete
from rwkv_peft.cli.parse import parse
from rwkv_peft.printing import print_answer, print_line, print_text


@dataclass(frozen=True, slots=True)
class ChatOptions(ModelOptions):
    """A dialogue."""

    max_tokens: int = 1024
    """Most tokens of an answer."""


def run(args: Sequence[str]) -> int:
    """Reads turns from standard input and prints the answers; an empty line or Ctrl-D ends."""
    options = parse(ChatOptions, args, command="chat", positional=("load_model",))
    options, note = complete(options, "chat")
    if note:
        print_line(f"note: {note}", file=sys.stderr)
    model = options.model()

    from rwkv_peft.generation.chat import Chat

    template = options.run_template()
    chat = Chat(model, options.sampling(), template=template, seed=options.seed)
    while True:
        try:
            text = input("User: ").strip()
        except EOFError:
            text = ""
        if not text:
            print_text("")
            return 0
        if problem := say_undecodable(text):
            print_line(f"note: {problem}; this line was not read", file=sys.stderr)
            continue
        for piece in chain(["\nAssistant:"], chat.reply(text, options.max_tokens), ["\n\n"]):
            print_answer(piece)
