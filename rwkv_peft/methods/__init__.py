"""What can be trained: which methods there are and which modules they adapt by default."""

from typing import Literal

Method = Literal["none", "lora"]

# as RWKV users know them: every large projection, not the low-rank maps, embedding or head
_PROJECTIONS = ("receptance", "key", "value", "output")
TARGET_MODULES = {
    "x070": _PROJECTIONS,
    "x060": (*_PROJECTIONS, "gate"),
    "x052": (*_PROJECTIONS, "gate"),
    "x051": (*_PROJECTIONS, "gate"),
    "x050": _PROJECTIONS,
}
