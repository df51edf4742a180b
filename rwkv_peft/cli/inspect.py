"""`rwkv-peft inspect FILE`"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.cli.parse import parse
from rwkv_peft.errors import ConfigError, RwkvPeftError


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """What to look at."""

    file: str = ""
    """A .pth or .safetensors file."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Prints version, geometry, dtypes, parameter count and what is odd about a file."""
    arguments = [f"{a}=true" if a == "--json" else a for a in args]
    options = parse(InspectOptions, arguments, command="inspect", positional=("file",))
    if not options.file:
        raise ConfigError("no file given: rwkv-peft inspect model.pth")
    facts = describe(options.file)
    if options.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "; ".join(value) or "nothing"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{name:<20} {value}")
    return 0


def describe(path: str | Path) -> dict[str, Any]:
    """The facts of a file, ready for JSON.

    Raises:
        CheckpointError: it cannot be read or is no RWKV model.
    """
    from rwkv_peft.checkpoint.pth import geometry_of, load_weights, read_weights
    from rwkv_peft.models import build

    weights = read_weights(path)
    geometry = geometry_of(weights)
    odd = []
    try:
        load_weights(build(geometry, op="reference"), weights, device="meta")
    except RwkvPeftError as error:
        odd.append(str(error))
    dtypes = Counter(str(x.dtype).removeprefix("torch.") for x in weights.values())
    if len(dtypes) > 1:
        odd.append("tensors of several types")
    if not geometry.has_first_value_mix:
        odd.append("no blocks.0.att.v0, v1, v2 (nothing reads them; some releases lack them)")
    broken = [n for n, x in weights.items() if not bool(x.isfinite().all())]
    odd += [f"{name} holds values that are not finite" for name in broken]
    if geometry.vocab_size != 65536:
        odd.append(f"vocabulary {geometry.vocab_size}, official files have 65536")
    facts = {"file": str(path), **asdict(geometry)}
    facts["n_head"] = geometry.n_head
    facts["dtype"] = dict(dtypes)
    facts["parameters"] = sum(x.numel() for x in weights.values())
    facts["bytes"] = Path(path).stat().st_size
    facts["odd"] = odd
    return facts
