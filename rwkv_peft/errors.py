"""The exceptions of RWKV-PEFT. The command line prints their message as one line and exits 2."""

# letters of a message: what it says of begins and ends it, a file's endless text fills its middle
BEGINNING, END = 1500, 500


class RwkvPeftError(Exception):
    """Base of every error a user can cause and mend; its message says what to do."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= BEGINNING + END:
            return text
        left_out = len(text) - BEGINNING - END
        return f"{text[:BEGINNING]} [{left_out:,} letters left out] {text[-END:]}"


class ConfigError(RwkvPeftError, ValueError):
    """A flag or key has a value that is unknown, impossible, or contradicts another."""


class ShapeError(RwkvPeftError, ValueError):
    """A tensor's shape or dtype disagrees with the contract of the function it was given to."""


class DataError(RwkvPeftError, ValueError):
    """A data file or a row of it cannot be used; the message names file and line."""


class CheckpointError(RwkvPeftError, ValueError):
    """A weight or adapter file cannot be read or does not fit, or a file cannot be written."""


class BackendUnavailableError(RwkvPeftError, RuntimeError):
    """An operator backend or device asked for by name cannot serve; the message says why."""


class TrainingError(RwkvPeftError, RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


class LostRankError(TrainingError):
    """Another process of the run is gone, and without it the run cannot go on."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work at once, with nothing to save.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
