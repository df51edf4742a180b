"""`rwkv-peft COMMAND …`: finds the command, prints errors as one line."""

import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rwkv_peft import __version__
from rwkv_peft.errors import RwkvPeftError, Stopped
from rwkv_peft.terminal import whole_process
from rwkv_peft.training.interrupt import Interrupt

# command -> what it does; its code is in the module of the same name
COMMANDS = {
    "train": "fine-tune a model on a file of texts",
    "data": "show what training would see of a data file; data prepare tokenises it",
    "convert": "bring an adapter or a state into another form, or out of an old one",
    "merge": "add an adapter into the model it was trained on",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "inspect": "say what a weight file holds",
    "init": "make a new model for training from nothing",
    "doctor": "check this machine: devices, versions, and each backend's results",
    "demo": "fine-tune the bundled small model on bundled dialogues",
}
ERROR_CODE = 2


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line and gives its exit code.

    0 is success and 2 an error told in one line; a run ended by a signal exits with 128 plus the
    signal's number, as shells do, after it has saved.
    """
    with whole_process():
        return _main(args)


def _main(args: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"rwkv-peft {__version__}")
        return 0
    shows_trace = "--debug" in arguments
    command, *rest = [a for a in arguments if a != "--debug"]
    try:
        with Interrupt(), warnings.catch_warnings():
            warnings.showwarning = _as_note
            return run(command, rest)
    except RwkvPeftError as error:
        if shows_trace:
            raise
        print(f"error: {error}", file=sys.stderr)
        return ERROR_CODE
    except OSError as error:
        # a disk that is full or a folder that may not be written, wherever it was met
        if shows_trace:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}:{where}", file=sys.stderr)
        return ERROR_CODE
    except KeyboardInterrupt as error:
        print("stopped", file=sys.stderr)
        return 128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT)


def run(command: str, args: Sequence[str]) -> int:
    """Runs one command; raises where `main` prints."""
    if command not in COMMANDS:
        from difflib import get_close_matches

        from rwkv_peft.errors import ConfigError

        near = get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command '{command}': {hint}")
    code: int = import_module(f"rwkv_peft.cli.{command}").run(args)
    return code


def _as_note(message: Warning | str, *_: Any, **__: Any) -> None:
    print("note:", " ".join(str(message).split()), file=sys.stderr)


def _help() -> str:
    lines = [f"rwkv-peft {__version__}: fine-tuning of RWKV models", ""]
    lines += [f"  rwkv-peft {name:<9} {what}" for name, what in COMMANDS.items()]
    lines += ["", "rwkv-peft COMMAND --help lists a command's flags; --debug shows error traces."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
