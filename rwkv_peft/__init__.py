"""RWKV-PEFT: fine-tuning of RWKV language models.

`load_model`, `train`, `merge`, `convert`, `generate` and `Tokenizer` are the public API; importing
this package loads neither torch nor any other heavy library until one of them is used.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rwkv_peft.api import convert, generate, load_model, merge, train
    from rwkv_peft.config import TrainConfig
    from rwkv_peft.data.tokenizer import Tokenizer

_HOME = {
    "load_model": "rwkv_peft.api",
    "convert": "rwkv_peft.api",
    "generate": "rwkv_peft.api",
    "merge": "rwkv_peft.api",
    "train": "rwkv_peft.api",
    "TrainConfig": "rwkv_peft.config",
    "Tokenizer": "rwkv_peft.data.tokenizer",
}
__all__ = ["Tokenizer", "TrainConfig", "convert", "generate", "load_model", "merge", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rwkv_peft' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
