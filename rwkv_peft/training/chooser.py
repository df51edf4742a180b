"""Values of settings, those that were left open filled in one after the other."""

from dataclasses import fields

from rwkv_peft.config import TrainConfig
from rwkv_peft.training.settings import Choice


class Chooser:
    """Values by name, those that were left open filled in one after the other."""

    def __init__(self, config: TrainConfig) -> None:
        self.values = {f.name: getattr(config, f.name) for f in fields(config)}
        self.choices: list[Choice] = []

    def choose(self, name: str, value: object, reason: str) -> None:
        """Takes a value for a field, unless the user gave one."""
        if self.values[name] in (None, "", "auto"):
            self.set(name, value, reason)

    def set(self, name: str, value: object, reason: str) -> None:
        """Takes a value for a field."""
        self.values[name] = value
        self.choices.append(Choice(name, value, reason))
