"""What can be trained: which methods there are and which modules they adapt by default."""

from typing import Literal

Method = Literal["none", "lora"]

# as RWKV users know them: every large projection, not the low-rank maps, embedding or head
TARGET_MODULES = {"x070": ("receptance", "key", "value", "output")}
