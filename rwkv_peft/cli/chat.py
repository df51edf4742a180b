"""`rwkv-peft chat --load_model M`"""

from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_peft.cli.generate import ModelOptions
from rwkv_peft.cli.parse import parse


@dataclass(frozen=True, slots=True)
class ChatOptions(ModelOptions):
    """A dialogue."""

    max_tokens: int = 1024
    """Most tokens of an answer."""


def run(args: Sequence[str]) -> int:
    """Reads turns from standard input and prints the answers; an empty line or Ctrl-D ends."""
    options = parse(ChatOptions, args, command="chat", positional=("load_model",))
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
            print()
            return 0
        print("\nAssistant:", end="", flush=True)
        for piece in chat.reply(text, options.max_tokens):
            print(piece, end="", flush=True)
        print("\n")
