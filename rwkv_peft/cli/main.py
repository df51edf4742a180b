"""`rwkv-peft COMMAND …`: finds the command, prints errors as one line."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rwkv_peft import __version__
from rwkv_peft.cli.environment import describe_missing
from rwkv_peft.deferred import defer_transformers
from rwkv_peft.device import use_expandable_segments
from rwkv_peft.errors import LostRankError, RwkvPeftError, Stopped
from rwkv_peft.language import choose_language, translate
from rwkv_peft.parallel.watch import LOST_CODE
from rwkv_peft.parallel.world import OWN
from rwkv_peft.printing import prepare_streams, print_line, print_text
from rwkv_peft.terminal import drop_unwritten, whole_process
from rwkv_peft.training.interrupt import Interrupt

# command -> what it does; its code is in the module of the same name
COMMANDS = {
    "train": "fine-tune a model on a file of texts",
    "data": "show what training would see of a data file; data prepare tokenises it",
    "convert": "bring an adapter or a state into another form, or out of an old one",
    "export": "write a model for other programs: GGUF, Ai00, rwkv.cpp, Hugging Face",
    "merge": "add an adapter into the model it was trained on",
    "eval": "measure a model: bits per byte of texts, multiple choice, tasks of lm-eval",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "inspect": "say what a weight file holds",
    "init": "make a new model for training from nothing",
    "doctor": "check this machine: devices, versions, and each backend's results",
    "demo": "fine-tune the bundled small model on bundled dialogues",
}
ERROR_CODE = 2
# of a program that was ended by SIGPIPE, as most are when the reader of their output goes
CLOSED_PIPE_CODE = 128 + 13


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line and gives its exit code.

    0 is success and 2 an error told in one line; a run ended by a signal exits with 128 plus the
    signal's number, as shells do, after it has saved. 141 is that of a closed pipe (`| head -1`).
    """
    prepare_streams()
    use_expandable_segments()
    arguments = list(sys.argv[1:] if args is None else args)
    with whole_process():
        try:
            code = _run_and_tell(arguments)
        except BrokenPipeError:
            return CLOSED_PIPE_CODE
        finally:
            drop_unwritten(sys.stdout)
    if code == LOST_CODE:
        # what connects ranks aborts at the interpreter's end where others are missing
        os._exit(code)
    return code


def _run_and_tell(arguments: list[str]) -> int:
    # peft imports it, and it warns of kernels for CPUs that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    shows_trace = "--debug" in arguments
    try:
        command, *rest = _take_language([a for a in arguments if a != "--debug"]) or ["--help"]
        with Interrupt(), defer_transformers(), warnings.catch_warnings():
            warnings.showwarning = _as_note
            try:
                return run(command, rest)
            finally:
                # a reader that went, or a full disk, is met here and not when the interpreter ends
                sys.stdout.flush()
    except LostRankError as error:
        # who started this process says it once, for all
        if OWN not in os.environ:
            _tell(f"error: {error}")
        return LOST_CODE
    except RwkvPeftError as error:
        if shows_trace:
            raise
        _tell(f"error: {error}")
        return ERROR_CODE
    except ModuleNotFoundError as error:
        if shows_trace or not (advice := describe_missing(error)):
            raise
        _tell(f"error: {advice}")
        return ERROR_CODE
    except BrokenPipeError:
        raise
    except OSError as error:
        # a disk that is full or a folder that may not be written, wherever it was met
        if shows_trace:
            raise
        where = f": {error.filename}" if error.filename else ""
        _tell(f"error: {error.strerror or error}{where}")
        return ERROR_CODE
    except KeyboardInterrupt as error:
        _tell("stopped")
        return 128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT)


def _take_language(arguments: list[str]) -> list[str]:
    """Chooses the language that --lang names, or the environment, and gives the other words."""
    rest, named = [], ""
    words = iter(arguments)
    for word in words:
        if word == "--lang":
            named = next(words, "") or "-"
        elif word.startswith("--lang="):
            named = word.partition("=")[2] or "-"
        else:
            rest.append(word)
    choose_language(named)
    return rest


def run(command: str, args: Sequence[str]) -> int:
    """Runs one command; raises where `main` prints."""
    if command in ("-h", "--help", "help"):
        print_text(_help())
        return 0
    if command in ("-V", "--version"):
        print_text(f"rwkv-peft {__version__}")
        return 0
    if command not in COMMANDS:
        from difflib import get_close_matches

        from rwkv_peft.errors import ConfigError

        if command.startswith("-") or os.path.exists(command) or os.path.splitext(command)[1]:
            raise ConfigError(
                f"'{command}' is no command, which comes first: "
                "rwkv-peft train model.pth data.jsonl"
            )
        near = get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command '{command}': {hint}")
    code: int = import_module(f"rwkv_peft.cli.{command}").run(args)
    return code


def _as_note(message: Warning | str, *_args: Any, **_options: Any) -> None:
    _tell(f"note: {message}")


def _tell(message: str) -> None:
    lines = (line.strip() for line in message.strip().split("\n"))
    print_line(" ".join(filter(None, lines)), file=sys.stderr)


def _help() -> str:
    lines = [f"rwkv-peft {__version__}: fine-tuning of RWKV models", ""]
    lines += [f"  rwkv-peft {name:<9} {translate(what)}" for name, what in COMMANDS.items()]
    lines += [
        "",
        "rwkv-peft COMMAND --help lists a command's flags; --debug shows error traces;",
        "--lang zh speaks Chinese.",
    ]
    return "\n".join(map(translate, lines))


if __name__ == "__main__":
    sys.exit(main())
